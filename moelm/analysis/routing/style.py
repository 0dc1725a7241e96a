"""What routing.html has beside the common look of pages, and the few lines with which it changes the layer."""

CSS = """
h3 { margin: 1.4rem 0 .4rem; font-size: .9rem; font-weight: 600; color: var(--quiet); break-after: avoid }
.bar { position: sticky; top: 0; z-index: 1; padding: .5rem 0; background: var(--paper);
  border-bottom: 1px solid var(--line); color: var(--quiet); font-size: .9rem }
.bar select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line);
  border-radius: .3rem; padding: .1rem .3rem }
.legend { display: inline-flex; flex-wrap: wrap; gap: .2rem; max-height: 5.6rem; overflow-y: auto; margin: 0 .5rem;
  vertical-align: middle }
.legend span { min-width: 1.9em; text-align: center; cursor: default }
#told { white-space: pre-wrap; overflow-wrap: anywhere }
.passage { margin: 0 0 .8rem; padding: .7rem .8rem; border: 1px solid var(--line); border-radius: .5rem;
  white-space: break-spaces; overflow-wrap: anywhere; font: .8rem/1.75 ui-monospace, monospace }
.passage span, .legend span { background: color-mix(in srgb, var(--hue) 42%, var(--paper));
  border-bottom: 2px solid var(--hue); color: var(--ink); print-color-adjust: exact; -webkit-print-color-adjust: exact }
.passage span { box-shadow: inset -1px 0 var(--paper) }
.words td { white-space: normal; vertical-align: top }
.words td + td { font: .8rem/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
@media print { .bar { position: static } #told { display: none } }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById('visits').textContent)
const bytes = Uint8Array.from(atob(data.experts), letter => letter.charCodeAt(0))
const experts = data.wide ? new Uint16Array(bytes.buffer) : bytes
const tokens = [...document.querySelectorAll('.passage span')]
const layer = document.getElementById('layer'), told = document.getElementById('told')
const visits = at => {
  const first = (layer.selectedIndex * tokens.length + at) * data.top_k
  return experts.slice(first, first + data.top_k)
}
const paint = () => tokens.forEach((token, at) => token.className = 'e' + visits(at)[0])
const tell = event => {
  const at = tokens.indexOf(event.target)
  if (at >= 0) told.textContent = JSON.stringify(event.target.textContent) + ' → ' + [...visits(at)].join(', ')
}
layer.disabled = false
layer.addEventListener('change', paint)
for (const kind of ['mouseover', 'click']) document.addEventListener(kind, tell)
paint()
"""
