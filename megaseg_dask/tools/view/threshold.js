// A threshold by eye: the scores as a mask, and how many objects it has in view.

import { ask } from './ask.js';
import { make, settled, slider } from './parts.js';

const $ = id => document.getElementById(id);
// The score 1 in stored whole numbers.
const MAX_STORED = 255;

// Return the stored value above which, strictly, a score counts: as `megaseg relabel` takes it.
export function limitOf(threshold, isRounded) {
  return isRounded ? Math.floor(MAX_STORED * threshold) : threshold;
}

export class Threshold {
  #picture;
  #shown;
  #changed;
  #number;
  #value;
  #isOn = false;
  #count;

  // `changed` has `look`, called when layers look otherwise, and `command`.
  constructor(picture, shown, changed) {
    this.#picture = picture;
    this.#shown = shown;
    this.#changed = changed;
    this.#number = shown.layers.findIndex(({ kind }) => kind === 'scores');
    $('threshold').hidden = this.#number < 0;
    $('counted').textContent = '';
    this.#count = settled(200, () => this.#ask());
    if (this.#number < 0) return;
    this.#value = this.#layer.threshold;
    const box = make('input', { type: 'checkbox', id: 'as-mask' });
    box.addEventListener('change', () => this.#set(box.checked, this.#value));
    $('thresholds').replaceChildren(
      make('label', { className: 'check' }, box, make('span', { textContent: 'scores as a mask' })),
      slider({
        id: 'threshold-value', text: 'above', low: 0, high: 1, step: 0.01, value: this.#value,
        change: value => this.#set(true, value), format: value => value.toFixed(2),
      }));
  }

  get #layer() {
    return this.#shown.layers[this.#number];
  }

  get options() {
    return this.#isOn ? [`--threshold ${this.#value}`] : [];
  }

  // Show the mask, with the labels as contours to compare it with; or show the scores again.
  #set(isOn, value) {
    const { layers } = this.#shown;
    if (isOn !== this.#isOn) {
      this.#layer.look.visible = isOn;
      for (const { kind, look, is_truth } of layers) {
        if (kind === 'labels') look.contours = isOn || is_truth;
      }
    }
    this.#isOn = isOn;
    this.#value = value;
    $('as-mask').checked = isOn;
    const limit = limitOf(value, this.#layer.is_rounded);
    this.#picture.setShader(this.#number, { asMask: isOn, limit });
    this.#changed.look();
    this.#changed.command();
    this.moved();
  }

  // Count again what is in view.
  moved() {
    if (this.#isOn) this.#count();
    else $('counted').textContent = '';
  }

  async #ask() {
    const view = await this.#picture.view();
    const value = this.#value;
    const question = {
      ...view, field: this.#shown.field, layer: this.#number, threshold: value,
    };
    const found = await ask('count', question);
    if (!found || !this.#isOn || value !== this.#value) return;
    const { n_objects: n, level } = found;
    const where = level ? ` (at level ${level}, which is shown)` : '';
    $('counted').textContent = n === null
      ? 'too much is in view to count objects: zoom in'
      : `${n} ${n === 1 ? 'object' : 'objects'} in view, in this plane${where}`;
  }
}
