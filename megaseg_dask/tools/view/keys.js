// Keys, wherever the focus is: on the page or in the picture.

// Call an action for its key, in place of what Neuroglancer would do.
export function bindKeys(windows, actions) {
  const listen = event => {
    const isTyping = event.target.matches?.('input[type=number], input[type=text]');
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    action();
  };
  for (const each of windows) each.addEventListener('keydown', listen, true);
}
