// The picture: Neuroglancer in a frame of our own origin, moved by its own objects.
//
// Neuroglancer knows a layer by the number that the page gives it. Beside a layer of labels it
// has their outlines, and the meshes of those that are selected.

import { pause } from './parts.js';

// Part of the window that stays free around the image.
const MARGIN = 1.04;
// How strongly objects that are not selected are seen.
const DIMMED = 0.2;

export class Picture {
  #frame;
  #viewer = null;
  #fitted = null;

  constructor(frame) {
    this.#frame = frame;
  }

  // Wait for Neuroglancer to start.
  async start() {
    while (!this.window?.viewer) await pause(20);
    this.#viewer = this.window.viewer;
    // It writes each change of its state to the frame's address, which nobody sees.
    this.window.history.replaceState = () => {};
  }

  get window() {
    return this.#frame.contentWindow;
  }

  // Show a new state; the image fills the window.
  async open(state, axes) {
    this.#viewer.state.reset();
    this.#viewer.state.restoreState(state);
    await this.fit(axes);
  }

  // Call a listener when anything in the picture was moved or changed.
  onMove(listener) {
    this.#viewer.state.changed.add(listener);
  }

  // -- position and zoom

  get #axes() {
    return this.#viewer.coordinateSpace.value.names;
  }

  // Voxels of the world, by axis.
  get position() {
    const values = this.#viewer.position.value;
    return Object.fromEntries(this.#axes.map((name, i) => [name, values[i]]));
  }

  set position(wanted) {
    const position = Float32Array.from(this.#viewer.position.value);
    this.#axes.forEach((name, i) => { if (name in wanted) position[i] = wanted[name]; });
    this.#viewer.position.value = position;
  }

  // Size of a pixel of the screen, in the smallest sides of a voxel.
  get pixel() {
    return this.#viewer.crossSectionScale.value;
  }

  // Show the whole image, at its middle in x and y, at the right scale whatever the voxel size.
  async fit(axes) {
    const panel = await this.#panel();
    const factors = this.#factors;
    const side = axis => axis.n * factors[axis.name];
    const of = Object.fromEntries(axes.map(axis => [axis.name, axis]));
    this.#viewer.crossSectionScale.value =
      MARGIN * Math.max(side(of.x) / panel.width, side(of.y) / panel.height);
    const shown = axes.filter(axis => axis.name in factors);
    this.#viewer.projectionScale.value = 0.9 * Math.hypot(...shown.map(side));
    const middle = ({ first, n }) => first + (n - 1) / 2;
    this.position = { x: middle(of.x), y: middle(of.y) };
    const { x, y } = this.position;
    this.#fitted = { x, y, scale: this.#viewer.crossSectionScale.value };
  }

  // The part of the plane of x and y that is seen, in voxels of the world, and the larger side of
  // what a pixel shows of it.
  async view() {
    const panel = await this.#panel();
    const { position } = this;
    const factors = this.#factors;
    const scale = this.#viewer.crossSectionScale.value;
    const first = {};
    const last = {};
    for (const [name, pixels] of [['x', panel.width], ['y', panel.height]]) {
      const half = pixels * scale / factors[name] / 2;
      first[name] = position[name] - half;
      last[name] = position[name] + half;
    }
    return { position, first, last, pixel: scale / Math.max(factors.x, factors.y) };
  }

  // Sides of a voxel of the world in Neuroglancer's own unit, which is the smallest of them.
  get #factors() {
    const { displayDimensionIndices, canonicalVoxelFactors } =
      this.#viewer.displayDimensionRenderInfo.value;
    const factors = {};
    displayDimensionIndices.forEach((index, i) => {
      if (index >= 0) factors[this.#axes[index]] = canonicalVoxelFactors[i];
    });
    return factors;
  }

  // Position and size in pixels of the panel that shows the plane of x and y.
  async #panel() {
    for (;;) {
      const panel = [...this.#viewer.display.panels].find(({ sliceView }) => sliceView);
      const box = panel?.element.getBoundingClientRect();
      if (box?.width) return box;
      await pause(20);
    }
  }

  // Whether the view is as the last fit left it.
  get #isFitted() {
    const { x, y } = this.position;
    const fitted = this.#fitted;
    return fitted && fitted.x === x && fitted.y === y &&
      fitted.scale === this.#viewer.crossSectionScale.value;
  }

  get layout() {
    const { layout } = this.#viewer.state.toJSON();
    return typeof layout === 'string' ? layout : layout?.type;
  }

  // Panels change their size: what was fitted is fitted again.
  async setLayout(name, axes) {
    const wasFitted = this.#isFitted;
    this.#viewer.layout.restoreState(name);
    if (wasFitted) await this.fit(axes);
  }

  // -- layers

  #managed(name) {
    return this.#viewer.layerManager.getLayerByName(String(name));
  }

  #layer(name) {
    return this.#managed(name)?.layer;
  }

  setVisible(name, visible) {
    this.#managed(name)?.setVisible(visible);
  }

  setOpacity(name, opacity) {
    this.#layer(name).opacity.value = opacity;
  }

  // Read a layer from another address, if it is another one.
  setSource(name, url) {
    const [source] = this.#layer(name)?.layer?.dataSources ?? [];
    if (source && source.spec.url !== url) source.spec = { ...source.spec, url };
  }

  // Set values of a layer's shader, by the names of its controls.
  setShader(name, values) {
    const state = this.#layer(name).shaderControlState;
    state.restoreState({ ...state.toJSON(), ...values });
  }

  // Show labels: filled or as contours; `selected` ids stand out, and of others only those of
  // `kept` are seen, if it is given.
  setLabels(name, { visible, opacity, contours, selected, kept }) {
    const ids = selected.length ? selected : kept ?? [];
    const others = kept ? 0 : DIMMED;
    this.setVisible(name, visible);
    this.setVisible(`${name}:outlines`, visible && contours);
    const filled = this.#layer(name).displayState;
    const lines = this.#layer(`${name}:outlines`).displayState;
    // In contours, what is selected is filled a little too.
    filled.selectedAlpha.value = contours && !selected.length ? 0 : opacity;
    filled.notSelectedAlpha.value = contours ? 0 : opacity * others;
    lines.selectedAlpha.value = Math.min(1, 2 * opacity);
    lines.notSelectedAlpha.value = Math.min(1, 2 * opacity) * others;
    this.#show(name, ids);
  }

  #show(name, ids) {
    const { visibleSegments } = this.#layer(name).displayState.segmentationGroupState.value;
    visibleSegments.clear();
    visibleSegments.add(ids.map(BigInt));
  }

  // Draw meshes of the selected objects, from a source that the server names.
  setMeshes(name, source, selected) {
    const [data] = this.#layer(`${name}:meshes`).dataSources;
    if (source && data.spec.url !== source) data.spec = { ...data.spec, url: source };
    this.#show(`${name}:meshes`, selected);
    // The slices would hide them.
    this.#viewer.showPerspectiveSliceViews.value = !selected.length;
  }

  // -- the pointer

  // Call a listener when the pointer moves over the picture.
  onPoint(listener) {
    this.#viewer.mouseState.changed.add(listener);
  }

  // Voxels of the world under the pointer, by axis; null if it is elsewhere.
  get pointed() {
    const { active, position } = this.#viewer.mouseState;
    if (!active) return null;
    return Object.fromEntries(this.#axes.map((name, i) => [name, position[i]]));
  }

  // The value of a layer under the pointer, if the layer is visible and was read there.
  valueOf(name) {
    const layer = this.#layer(name);
    const value = layer && this.#viewer.layerSelectedValues.get(layer)?.value;
    if (value === undefined || value === null) return null;
    return Number(value.key ?? value.value ?? value);
  }

  // Call a listener for a double click, in place of what Neuroglancer would do.
  onDoubleClick(listener) {
    this.window.addEventListener('dblclick', event => {
      event.stopImmediatePropagation();
      listener(event);
    }, true);
  }
}
