export const $ = (id) => document.getElementById(id);

/** Text goes in as text: nothing that a model says becomes markup. */
export function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter(Boolean));
  return node;
}
