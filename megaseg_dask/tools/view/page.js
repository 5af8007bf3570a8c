// The page around the picture: what is there comes from the server, all else happens here.

import { make, slider } from './parts.js';
import { Picture } from './picture.js';

const $ = id => document.getElementById(id);
const picture = new Picture($('picture'));
let shown = null;
// How the layers look, by name: they stay so in the next field.
const looks = new Map();

export async function ask(name, question = {}) {
  try {
    const answer = await fetch(`ask/${name}`, { method: 'POST', body: JSON.stringify(question) });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    const found = await answer.json();
    $('error').textContent = found.error || '';
    return found.error ? null : found;
  } catch (error) {
    $('error').textContent = `${error.message}: is megaseg view still running?`;
    return null;
  }
}

async function open(field) {
  const found = await ask('scene', field === undefined ? {} : { field });
  if (!found) return;
  const layout = shown && picture.layout;
  shown = found;
  await picture.open(found.state, found.axes);
  if (layout) picture.layout = layout;
  build();
}

function build() {
  $('name').textContent = shown.name;
  document.title = shown.name;
  $('field').textContent = shown.field;
  $('axes').replaceChildren(...shown.axes.filter(hasSlider).map(axisSlider));
  $('layers').replaceChildren(...shown.layers.map(layerBox));
  buildPlate();
  follow();
}

function hasSlider(axis) {
  return 'tz'.includes(axis.name) && axis.n > 1;
}

function axisSlider(axis) {
  const text = axis.name === 't' ? 'time' : axis.name;
  return slider({
    id: `axis-${axis.name}`, text, low: 0, high: axis.n - 1, step: 1,
    change: value => { picture.position = { [axis.name]: axis.first + value }; },
  });
}

// Whoever moves in the picture moves the sliders too.
function follow() {
  const { position } = picture;
  for (const axis of shown.axes.filter(hasSlider)) {
    const at = Math.round(position[axis.name] - axis.first);
    $(`axis-${axis.name}`).show(at);
  }
  for (const b of document.querySelectorAll('[data-layout]')) {
    b.ariaPressed = String(b.dataset.layout === picture.layout);
  }
}

function layerBox(layer, number) {
  const look = { visible: layer.visible, opacity: layer.opacity, ...looks.get(layer.name) };
  looks.set(layer.name, look);
  const box = make('input', { type: 'checkbox', id: `visible-${number}` });
  const set = changes => {
    Object.assign(look, changes);
    box.checked = look.visible;
    picture.setVisible(number, look.visible);
    picture.setOpacity(number, look.opacity);
  };
  box.addEventListener('change', () => set({ visible: box.checked }));
  const controls = make('div', {}, slider({
    id: `opacity-${number}`, text: 'opacity', low: 0, high: 1, step: 0.01, value: look.opacity,
    change: opacity => set({ opacity }),
  }));
  if (layer.span) controls.append(...rangeSliders(layer, number));
  set({});
  return make('div', { className: 'layer' },
    make('label', {}, box, make('span', { textContent: layer.name })), controls);
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

for (const b of document.querySelectorAll('[data-layout]')) {
  b.addEventListener('click', () => { picture.layout = b.dataset.layout; });
}
$('fit').addEventListener('click', () => picture.fit(shown.axes));

await picture.start();
await open();
picture.onMove(follow);
