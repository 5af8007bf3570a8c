// Small parts of the page.

// Make an element; texts are set as text, so that no name of a file becomes markup.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const rounded = value => String(Number(Number(value).toPrecision(4)));

// Make a labelled slider; its input has `show(value)`, which moves it unless it is held.
export function slider({ id, text, low, high, step, value = low, change, format = rounded }) {
  const input = make('input', { type: 'range', id, min: low, max: high, step });
  const output = make('output');
  let held = false;
  input.addEventListener('pointerdown', () => { held = true; });
  input.addEventListener('pointerup', () => { held = false; });
  input.show = next => {
    if (!held) input.value = next;
    output.textContent = format(Number(input.value));
  };
  input.addEventListener('input', () => {
    output.textContent = format(Number(input.value));
    change(Number(input.value));
  });
  input.show(value);
  return make('label', { className: 'slider' }, make('span', { textContent: text }), input, output);
}

export function pause(milliseconds) {
  return new Promise(resolve => setTimeout(resolve, milliseconds));
}

// Return a function that calls another one once things have been quiet, with the last arguments.
export function settled(milliseconds, call) {
  let timer = null;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), milliseconds);
  };
}
