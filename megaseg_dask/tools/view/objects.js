// Single objects of the labels: selected, gone to by id, or hidden because they are small.

import { ask } from './ask.js';
import { make, rounded, settled, slider } from './parts.js';

const $ = id => document.getElementById(id);
// Meshes that are drawn at once.
const MAX_MESHES = 20;
// Steps of the slider of sizes, which grow with the size.
const STEPS = 100;

export class Objects {
  #picture;
  #shown;
  #command;
  #selected = [];
  // Ids and sizes of all objects, the largest first; and how many of them are kept.
  #listed = null;
  #minSize = 0;
  // Descriptions by id, of the timepoint and layer that `#key` names.
  #known = new Map();
  #key = '';

  constructor(picture, shown, command) {
    this.#picture = picture;
    this.#shown = shown;
    this.#command = command;
    $('objects').hidden = this.#first < 0;
    $('go').onsubmit = event => {
      event.preventDefault();
      this.goTo(Number($('object').value));
    };
    $('clear').onclick = () => this.select([]);
    $('sizes').replaceChildren(slider({
      id: 'min-size', text: 'min size', low: 0, high: STEPS, step: 1, value: 0,
      change: settled(60, at => this.#hide(at)), format: () => this.#sizeText(),
    }));
    $('selected').textContent = '';
    this.#key = this.#keyNow();
  }

  // The first layer of labels that is seen, or the first of all; -1 if there is none.
  get #first() {
    const { layers } = this.#shown;
    const seen = layers.findIndex(({ kind, look }) => kind === 'labels' && look?.visible);
    return seen < 0 ? layers.findIndex(({ kind }) => kind === 'labels') : seen;
  }

  #keyNow() {
    const t = this.#shown.axes.find(({ name }) => name === 't');
    const at = t ? Math.round(this.#picture.position.t - t.first) : 0;
    return `${this.#first} ${at}`;
  }

  #question(more = {}) {
    const { position } = this.#picture;
    return { field: this.#shown.field, layer: this.#first, position, ...more };
  }

  // Options of the command that hides what is hidden here.
  get options() {
    return this.#minSize > 0 ? [`--min-size ${this.#minSize}`] : [];
  }

  // -- drawing

  draw() {
    const kept = this.#minSize > 0 ? this.#keptIds() : null;
    this.#shown.layers.forEach(({ kind, look, is_truth }, number) => {
      if (kind !== 'labels') return;
      const isFirst = number === this.#first;
      this.#picture.setLabels(number, {
        ...look,
        selected: isFirst ? this.#selected : [],
        kept: isFirst && !is_truth ? kept : null,
      });
    });
    $('clear').hidden = !this.#selected.length;
  }

  // Ids start again at each timepoint: what is known of them ends there.
  moved() {
    const key = this.#keyNow();
    if (key === this.#key) return;
    this.#key = key;
    this.#known.clear();
    this.#listed = null;
    this.#minSize = 0;
    $('min-size')?.show(0);
    this.select([]);
    this.#command();
  }

  // -- selection

  // Select the object under the pointer alone, or also; again, or on background, none.
  pick(isMore) {
    const id = this.#picture.valueOf(this.#first);
    const isSelected = this.#selected.includes(id);
    if (!id) {
      if (!isMore) this.select([]);
    } else if (isMore) {
      const others = this.#selected.filter(other => other !== id);
      this.select(isSelected ? others : [...others, id]);
    } else {
      this.select(isSelected && this.#selected.length === 1 ? [] : [id]);
    }
  }

  async select(ids) {
    this.#selected = ids;
    this.draw();
    $('selected').textContent = ids.length > 1 ? `${ids.length} objects selected` : '';
    const [meshes, text] = await Promise.all([
      ids.length ? ask('meshes', this.#question()) : null,
      ids.length === 1 ? this.#describe(ids[0]) : '',
    ]);
    // Another one may have been selected since.
    if (this.#selected !== ids) return;
    if (text) $('selected').textContent = text;
    this.#picture.setMeshes(this.#first, meshes?.source, ids.slice(0, MAX_MESHES));
  }

  async goTo(id) {
    const found = await ask('object', this.#question({ id }));
    if (!found) return;
    if (!found.found) {
      $('selected').textContent = `there is no object ${id} here`;
      return;
    }
    this.#picture.position = found.position;
    this.select([id]);
  }

  // -- words

  async #describe(id) {
    if (!this.#known.has(id)) {
      const key = this.#key;
      const found = await ask('object', this.#question({ id }));
      if (!found || key !== this.#key) return '';
      this.#known.set(id, found.found ? textOf(found) : `object ${id}`);
    }
    return this.#known.get(id);
  }

  // Say what is known of the object under the pointer, at once.
  showPointed() {
    const entry = $(`pointed-${this.#first}`);
    const text = this.#known.get(this.#picture.valueOf(this.#first));
    if (entry && text) entry.textContent = text;
  }

  // Ask about the object under the pointer.
  async describePointed() {
    const id = this.#picture.valueOf(this.#first);
    if (!id || this.#known.has(id) || !this.#picture.pointed) return;
    await this.#describe(id);
    this.showPointed();
  }

  // -- sizes

  async #hide(at) {
    if (!this.#listed) {
      const found = await ask('sizes', this.#question());
      if (!found) return;
      this.#listed = found;
    }
    const { sizes } = this.#listed;
    const largest = sizes[0] ?? 1;
    this.#minSize = at ? Math.round(largest ** (at / STEPS)) : 0;
    $('min-size').show(at);
    $('selected').textContent = this.#minSize
      ? `${this.#keptIds().length} of ${sizes.length} objects have ${this.#minSize} voxels or more`
      : '';
    this.draw();
    this.#command();
  }

  #sizeText() {
    return this.#minSize ? `< ${this.#minSize}` : 'none';
  }

  #keptIds() {
    const { ids, sizes } = this.#listed;
    const end = sizes.findIndex(size => size < this.#minSize);
    return end < 0 ? ids : ids.slice(0, end);
  }
}

function textOf({ id, n_voxels, volume_um3, intensity_mean, is_exact }) {
  const about = is_exact ? '' : 'about ';
  const parts = [`object ${id}: ${about}${n_voxels} voxels`];
  if (volume_um3 !== null) parts.push(`${about}${rounded(volume_um3)} µm³`);
  if (intensity_mean !== null) parts.push(`mean intensity ${rounded(intensity_mean)}`);
  return parts.join(', ');
}
