// Questions to the server.

const error = document.getElementById('error');

// Ask the server; an answer of null means that the page says what went wrong.
export async function ask(name, question = {}) {
  try {
    const answer = await fetch(`ask/${name}`, { method: 'POST', body: JSON.stringify(question) });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    const found = await answer.json();
    error.textContent = found.error || '';
    return found.error ? null : found;
  } catch (failure) {
    error.textContent = `${failure.message}: is megaseg view still running?`;
    return null;
  }
}
