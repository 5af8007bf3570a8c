// The page around the picture: what is there comes from the server, all else happens here.

import { ask } from './ask.js';
import { bindKeys } from './keys.js';
import { Live } from './live.js';
import { Objects } from './objects.js';
import { make, rounded, settled, slider } from './parts.js';
import { Picture } from './picture.js';
import { Threshold } from './threshold.js';

const $ = id => document.getElementById(id);
const picture = new Picture($('picture'));
const live = new Live(picture, $('live'));
let shown = null;
let objects = null;
let threshold = null;
// How the layers look, by name: they stay so in the next field.
const looks = new Map();

async function open(field) {
  const found = await ask('scene', field === undefined ? {} : { field });
  if (!found) return;
  const layout = shown && picture.layout;
  shown = null;
  live.prepare(found);
  await picture.open(found.state, found.axes);
  live.look();
  if (layout) await picture.setLayout(layout, found.axes);
  shown = found;
  build();
}

function build() {
  $('name').textContent = shown.name;
  document.title = shown.name;
  $('field').textContent = shown.field;
  $('axes').replaceChildren(...shown.axes.filter(hasSlider).map(axisSlider));
  buildPlate();
  for (const layer of shown.layers) {
    const { visible, opacity } = layer;
    layer.look = looks.get(layer.name) ?? { visible, opacity, contours: layer.is_truth };
    looks.set(layer.name, layer.look);
  }
  objects = new Objects(picture, shown, tellCommand);
  threshold = new Threshold(picture, shown, { look: drawLayers, command: tellCommand });
  $('layers').replaceChildren(...shown.layers.map(layerBox));
  drawLayers();
  tellCommand();
  follow();
  point();
}

// -- position

const hasSlider = axis => 'tz'.includes(axis.name) && axis.n > 1;

function axisSlider(axis) {
  return slider({
    id: `axis-${axis.name}`, text: axis.name === 't' ? 'time' : axis.name,
    low: 0, high: axis.n - 1, step: 1,
    change: value => { picture.position = { [axis.name]: axis.first + value }; },
    format: value => `${value + 1} / ${axis.n}`,
  });
}

// Whoever moves in the picture moves the sliders too.
function follow() {
  if (!shown) return;
  const { position } = picture;
  for (const axis of shown.axes.filter(hasSlider)) {
    $(`axis-${axis.name}`).show(Math.round(position[axis.name] - axis.first));
  }
  for (const b of document.querySelectorAll('[data-layout]')) {
    b.ariaPressed = String(b.dataset.layout === picture.layout);
  }
  objects?.moved();
  threshold?.moved();
}

function step(name, by) {
  const axis = shown?.axes.find(found => found.name === name);
  if (!axis) return;
  const at = Math.round(picture.position[name] - axis.first) + by;
  picture.position = { [name]: axis.first + Math.min(Math.max(at, 0), axis.n - 1) };
}

const setLayout = name => picture.setLayout(name, shown.axes);

// -- layers

function layerBox(layer, number) {
  const box = make('input', { type: 'checkbox', id: `visible-${number}` });
  box.addEventListener('change', () => change(layer, { visible: box.checked }));
  const controls = make('div', {}, slider({
    id: `opacity-${number}`, text: 'opacity', low: 0, high: 1, step: 0.01,
    value: layer.look.opacity, change: opacity => change(layer, { opacity }),
  }));
  if (layer.kind === 'labels') controls.append(styleButtons(layer, number));
  if (layer.span) controls.append(...rangeSliders(layer, number));
  return make('div', { className: 'layer' },
    make('label', {}, box, make('span', { textContent: layer.name })), controls);
}

function change(layer, changes) {
  Object.assign(layer.look, changes);
  drawLayers();
}

function drawLayers() {
  shown.layers.forEach((layer, number) => {
    const { look } = layer;
    $(`visible-${number}`).checked = look.visible;
    if (layer.kind === 'labels') {
      $(`contours-${number}`).ariaPressed = String(look.contours);
      $(`filled-${number}`).ariaPressed = String(!look.contours);
    } else {
      picture.setVisible(number, look.visible);
      picture.setOpacity(number, look.opacity);
    }
  });
  objects.draw();
}

function styleButtons(layer, number) {
  const button = (text, contours) => make('button', {
    id: `${text}-${number}`, textContent: text, onclick: () => change(layer, { contours }),
  });
  return make('div', { className: 'row' }, button('filled', false), button('contours', true));
}

function rangeSliders(layer, number) {
  const range = [...layer.range];
  const [low, high] = layer.span;
  return ['black', 'white'].map((text, i) => slider({
    id: `${i ? 'high' : 'low'}-${number}`, text, low, high, step: (high - low) / 400,
    value: range[i],
    change: value => {
      range[i] = value;
      picture.setShader(number, { normalized: { range: [...range] } });
    },
  }));
}

function toggle(kind) {
  const layers = shown.layers.filter(layer => layer.kind === kind);
  const visible = !layers.some(layer => layer.look.visible);
  // Several label images would hide each other.
  const chosen = visible && kind === 'labels' ? layers.slice(0, 1) : layers;
  for (const layer of chosen) layer.look.visible = visible;
  drawLayers();
}

function toggleContours() {
  const layers = shown.layers.filter(layer => layer.kind === 'labels');
  const contours = !layers.some(layer => layer.look.visible && layer.look.contours);
  for (const layer of layers) layer.look.contours = contours || layer.is_truth;
  drawLayers();
}

// -- wells and fields

function buildPlate() {
  $('plate').hidden = !shown.rows.length;
  if (!shown.rows.length) return;
  const well = shown.field.split('/').slice(0, 2).join('/');
  const of = name => shown.fields.filter(field => field.startsWith(`${name}/`));
  const wellButton = name => make('button', {
    title: name, ariaLabel: `well ${name}`, ariaPressed: String(name === well),
    disabled: !of(name).length, onclick: () => open(of(name)[0]),
  });
  const head = make('tr', {}, make('th'),
    ...shown.columns.map(column => make('th', { textContent: column, scope: 'col' })));
  const rows = shown.rows.map(row => make('tr', {},
    make('th', { textContent: row, scope: 'row' }),
    ...shown.columns.map(column => make('td', {}, wellButton(`${row}/${column}`)))));
  $('wells').replaceChildren(head, ...rows);
  $('fields').replaceChildren(...of(well).map(field => make('button', {
    textContent: field.split('/')[2], ariaLabel: `field ${field}`,
    ariaPressed: String(field === shown.field), onclick: () => open(field),
  })));
}

// -- what is under the pointer

const describe = settled(150, () => objects?.describePointed());

function point() {
  if (!shown) return;
  const at = picture.pointed;
  const rows = at ? [...places(at), ...values()] : [['', 'move the pointer over the picture']];
  $('pointed').replaceChildren(...rows.flatMap(([name, text, id = '']) => [
    make('dt', { textContent: name }), make('dd', { textContent: text, id }),
  ]));
  objects.showPointed();
  describe();
}

// Return the position: in voxels and, where their size is known, in µm or time.
function places(at) {
  const axes = shown.axes.filter(axis => axis.name !== 't');
  const index = axis => Math.round(at[axis.name] - axis.first);
  const rows = [[axes.map(axis => axis.name).join(', '), axes.map(index).join(', ')]];
  if (axes.every(axis => axis.unit)) {
    const um = axis => rounded(index(axis) * axis.scale * 1e6);
    rows.push(['µm', axes.map(um).join(', ')]);
  }
  return rows;
}

function values() {
  const rows = [];
  shown.layers.forEach((layer, number) => {
    const value = picture.valueOf(number);
    if (value === null || Number.isNaN(value)) return;
    if (layer.kind === 'labels') {
      rows.push([layer.name, value ? `object ${value}` : 'background', `pointed-${number}`]);
    } else if (layer.kind === 'scores') {
      rows.push([layer.name, rounded(value / layer.range[1])]);
    } else {
      rows.push([layer.name, rounded(value)]);
    }
  });
  return rows;
}

// -- the command that gives what is seen

function tellCommand() {
  const options = [...(threshold?.options ?? []), ...(objects?.options ?? [])];
  $('command').hidden = !shown.command || !options.length;
  const name = options.join('_').replaceAll('--', '').replaceAll(' ', '-');
  $('line').textContent = [shown.command, ...options, `--label-name ${name}`].join(' ');
}

async function copy() {
  try {
    await navigator.clipboard.writeText($('line').textContent);
    $('copy').textContent = 'copied';
  } catch {
    // A browser may refuse: then a person copies what is selected.
    getSelection().selectAllChildren($('line'));
    $('copy').textContent = 'press Ctrl-C';
  }
  setTimeout(() => { $('copy').textContent = 'copy'; }, 1500);
}

// -- runs that are not finished

async function watch() {
  const found = await ask('status');
  $('notice').hidden = !found?.notice;
  $('notice').textContent = found?.notice ?? '';
  if (found?.notice) setTimeout(watch, 10000);
}

// -- the beginning

for (const b of document.querySelectorAll('[data-layout]')) {
  b.addEventListener('click', () => setLayout(b.dataset.layout));
}
$('fit').addEventListener('click', () => picture.fit(shown.axes));
$('copy').addEventListener('click', copy);
$('keys').addEventListener('click', () => $('help').showModal());

await picture.start();
await open();
picture.onMove(follow);
picture.onPoint(point);
picture.onDoubleClick(event => objects.pick(event.shiftKey));
bindKeys([window, picture.window], {
  f: () => picture.fit(shown.axes),
  ',': () => step('z', -1),
  '.': () => step('z', 1),
  '[': () => step('t', -1),
  ']': () => step('t', 1),
  i: () => toggle('image'),
  l: () => toggle('labels'),
  s: () => toggle('scores'),
  c: toggleContours,
  3: () => setLayout(picture.layout === 'xy' ? '4panel' : 'xy'),
  Escape: () => objects.select([]),
  '?': () => ($('help').open ? $('help').close() : $('help').showModal()),
});
watch();
// What is predicted meanwhile is counted too.
setInterval(() => { if (live.isOn && !document.hidden) threshold?.moved(); }, 2000);
