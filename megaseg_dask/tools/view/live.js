// Scores that are predicted where one looks: their server is told where that is, and tells what
// to know of what is seen, and where the newest scores are.

const PAUSE_MS = 400;
// More than the parts of a large screen: requests that wait for predictions hold up no others.
const MAX_REQUESTS = 2048;

export class Live {
  #picture;
  #banner;
  #field = null;
  #layers = [];
  #isAsking = false;

  constructor(picture, banner) {
    this.#picture = picture;
    this.#banner = banner;
    setInterval(() => this.look(), PAUSE_MS);
  }

  // Find the predicted layers of a scene: they come from another server than the page.
  prepare(scene) {
    const isPredicted = ({ source }) =>
      new URL((source.url ?? source).split('|')[0]).host !== location.host;
    this.#layers = scene.state.layers.filter(isPredicted).map(layer => layer.name);
    this.#field = this.#layers.length ? scene.field : null;
    this.#banner.hidden = true;
    if (this.#field === null) return;
    // Nothing is predicted that nobody looks at, and the image waits for no prediction.
    scene.state.prefetch = false;
    scene.state.concurrentDownloads = MAX_REQUESTS;
  }

  // Whether scores of the scene are being predicted.
  get isOn() {
    return this.#field !== null;
  }

  // Tell the server where a person looks, unless an answer is still waited for.
  async look() {
    const field = this.#field;
    if (field === null || document.hidden || this.#isAsking) return;
    const { position, pixel } = this.#picture;
    // A picture that was just opened has no size yet.
    if (!Number.isFinite(pixel)) return;
    this.#isAsking = true;
    const found = await look({ field, position, pixel });
    this.#isAsking = false;
    if (found && field === this.#field) this.#take(found);
  }

  #take({ status, is_problem: isProblem, source }) {
    this.#banner.hidden = !status;
    this.#banner.textContent = status;
    this.#banner.classList.toggle('problem', isProblem);
    for (const layer of this.#layers) this.#picture.setSource(layer, source);
  }
}

// Ask quietly: it is asked all the time, and other questions tell if the server has ended.
async function look(question) {
  try {
    const answer = await fetch('ask/look', { method: 'POST', body: JSON.stringify(question) });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}
