// The picture: Neuroglancer in a frame of our own origin, moved by its own objects.
//
// Neuroglancer knows a layer by the number that the page gives it.

const MARGIN = 1.04;

export class Picture {
  #frame;
  #viewer = null;

  constructor(frame) {
    this.#frame = frame;
  }

  // Wait for Neuroglancer to start.
  async start() {
    while (!this.#frame.contentWindow?.viewer) await pause(20);
    this.#viewer = this.#frame.contentWindow.viewer;
    // It writes each change of its state to the frame's address, which nobody sees.
    this.#frame.contentWindow.history.replaceState = () => {};
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

  onMove(listener) {
    this.#viewer.state.changed.add(listener);
  }

  // -- position and zoom

  // Voxels of the world, by axis.
  get position() {
    const names = this.#viewer.coordinateSpace.value.names;
    const values = this.#viewer.position.value;
    return Object.fromEntries(names.map((name, i) => [name, values[i]]));
  }

  set position(wanted) {
    const names = this.#viewer.coordinateSpace.value.names;
    const position = Float32Array.from(this.#viewer.position.value);
    names.forEach((name, i) => { if (name in wanted) position[i] = wanted[name]; });
    this.#viewer.position.value = position;
  }

  // Show the whole image, at its middle in x and y, at the right scale whatever the voxel size.
  async fit(axes) {
    const of = Object.fromEntries(axes.map(axis => [axis.name, axis]));
    const panel = await this.#panel();
    const sides = this.#sides(of);
    const { viewer } = this.#frame.contentWindow;
    viewer.crossSectionScale.value =
      MARGIN * Math.max(sides.x / panel.width, sides.y / panel.height);
    viewer.projectionScale.value = 1.3 * Math.hypot(...Object.values(sides));
    const middle = ({ first, n }) => first + (n - 1) / 2;
    this.position = { x: middle(of.x), y: middle(of.y) };
  }

  // Extents in Neuroglancer's own unit: the smallest side of a voxel.
  #sides(axes) {
    const shown = this.#viewer.displayDimensionRenderInfo.value;
    const names = shown.displayDimensionIndices.subarray
      ? [...shown.displayDimensionIndices].filter(i => i >= 0)
        .map(i => this.#viewer.coordinateSpace.value.names[i])
      : [];
    return Object.fromEntries(
      names.map((name, i) => [name, axes[name].n * shown.canonicalVoxelFactors[i]]));
  }

  // Size in pixels of the panel that shows the plane of x and y.
  async #panel() {
    for (;;) {
      const panels = [...this.#viewer.display.panels].filter(panel => panel.sliceView);
      const box = panels[0]?.element.getBoundingClientRect();
      if (box?.width) return box;
      await pause(20);
    }
  }

  get layout() {
    const layout = this.#viewer.state.toJSON().layout;
    return typeof layout === 'string' ? layout : layout?.type;
  }

  set layout(name) {
    this.#viewer.layout.restoreState(name);
  }

  // -- layers

  #layer(name) {
    return this.#viewer.layerManager.getLayerByName(String(name));
  }

  setVisible(name, visible) {
    this.#layer(name).setVisible(visible);
  }

  setOpacity(name, opacity) {
    const { layer } = this.#layer(name);
    if (layer.displayState) {
      layer.displayState.selectedAlpha.value = opacity;
      layer.displayState.notSelectedAlpha.value = opacity;
    } else {
      layer.opacity.value = opacity;
    }
  }

  // Set values of a layer's shader, by the names of its controls.
  setShader(name, values) {
    const state = this.#layer(name).layer.shaderControlState;
    state.restoreState({ ...state.toJSON(), ...values });
  }
}

function pause(milliseconds) {
  return new Promise(resolve => setTimeout(resolve, milliseconds));
}
