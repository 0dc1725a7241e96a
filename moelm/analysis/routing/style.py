"""How routing.html looks, and the few lines with which it changes the layer."""

CSS = """
:root { --paper: #fff; --ink: #1f2933; --quiet: #616e7c; --line: #e4e7eb }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15191e; --ink: #e4e7eb; --quiet: #9aa5b1; --line: #323f4b } }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
h1 { margin: 0 0 1rem; font-size: 1.1rem; font-weight: 600; color: var(--quiet); overflow-wrap: anywhere }
h2 { margin: 2.2rem 0 .5rem; font-size: 1.05rem }
h3 { margin: 1.4rem 0 .4rem; font-size: .9rem; font-weight: 600; color: var(--quiet); break-after: avoid }
.verdict { margin: 0 0 1rem; font-size: 1.4rem; line-height: 1.35; font-weight: 600; text-wrap: pretty }
figure { margin: 1.5rem 0; padding: .8rem; border: 1px solid var(--line); border-radius: .5rem;
  background: #fff; break-inside: avoid }
img { display: block; width: 100%; height: auto }
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
.table { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: bottom }
th { font-weight: 500; color: var(--quiet) }
td { white-space: nowrap }
.numbers :is(th, td) + :is(th, td) { padding: .35rem 0 .35rem .8rem; text-align: right }
.words td { white-space: normal; vertical-align: top }
.words td + td { font: .8rem/1.6 ui-monospace, monospace; overflow-wrap: anywhere }
footer { margin-top: 2.5rem; font-size: .85rem; color: var(--quiet) }
@media print { body { max-width: none; padding: 0 } .bar { position: static } #told { display: none } }
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
