"""The style sheet of the page: light, printable, and no wider than the screen that shows it."""

CSS = """\
:root { color-scheme: light; --ink: #1a1a1a; --mute: #5c5c5c; --line: #d6d6d6; --band: #f6f7f9; --link: #0b5394; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 0.5rem; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 0.5rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.75rem; padding-top: 0.75rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 0.5rem; }
p { max-width: 46rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
code { font-size: 0.85em; }
code span { display: inline-block; max-width: 100%; }
.about { color: var(--mute); }
nav ol { margin: 0.25rem 0; padding-left: 2.1rem; columns: 14rem; }
nav h2 { border: 0; margin: 1rem 0 0.25rem; padding: 0; font-size: 1rem; }
.verdict { border: 2px solid; border-left-width: 0.6rem; padding: 0.5rem 0.9rem; margin: 1rem 0; border-radius: 4px; }
.verdict p { margin: 0.15rem 0; }
.verdict.good { border-color: #00724f; background: #eef8f4; }
.verdict.warn { border-color: #9a6200; background: #fdf6e7; }
.verdict.bad { border-color: #b3001b; background: #fdeced; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; margin: 0.75rem 0 1rem; border: 1px solid var(--line);
  border-radius: 4px; }
.scroll:focus-visible { outline: 3px solid var(--link); }
table { border-collapse: separate; border-spacing: 0; font-size: 0.85rem; }
caption { text-align: left; color: var(--mute); padding: 0.5rem 0.7rem; border-bottom: 1px solid var(--line); }
caption span { position: sticky; left: 0.7rem; display: inline-block; width: min(46rem, 100vw - 4rem); }
th, td { padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ececec; }
th { font-weight: 600; }
thead th { background: var(--band); border-bottom: 1px solid #b9b9b9; vertical-align: bottom; }
thead tr.spans th { text-align: center; border-left: 1px solid var(--line); }
thead tr.spans td { background: var(--band); }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead .n { white-space: normal; }
tbody th { position: sticky; left: 0; background: #fff; font-weight: 400; min-width: 6.5rem; z-index: 1; }
tr.section > * { border-top: 2px solid #8a8a8a; }
.i { display: block; color: var(--mute); font-size: 0.8rem; white-space: nowrap; }
.t { min-width: 8rem; }
.w { white-space: nowrap; }
.long { min-width: 16rem; }
.prose { min-width: 26rem; }
td.best > b { font-weight: 700; }
td.tied > u { text-underline-offset: 3px; text-decoration-thickness: 2px; }
.mute { color: var(--mute); }
.good { color: #00583c; } .warn { color: #7a4d00; } .bad { color: #b3001b; font-weight: 700; }
.heat { text-align: center; }
figure { margin: 0.75rem 0 1.25rem; }
figure .scroll { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--mute); font-size: 0.875rem; max-width: 46rem; padding: 0.4rem 0; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; padding: 0.3rem 0; color: var(--link); }
figcaption p { margin: 0.25rem 0; color: var(--ink); }
.examples { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; }
.examples h4 { margin: 0.5rem 0; }
@media (max-width: 40rem) {
  main { padding: 0.75rem; }
  th, td { padding: 0.3rem 0.5rem; }
  tbody th { max-width: 8.5rem; overflow-wrap: anywhere; }
  tbody th.w { white-space: normal; }
  .long { min-width: 12rem; }
}
@media print {
  body { font-size: 9pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .scroll { overflow: visible; border: 0; }
  figure img { min-width: 0 !important; }
  tbody th { position: static; }
  table { font-size: 7pt; }
  details::details-content { content-visibility: visible; block-size: auto; }
  summary { display: none; }
}
"""
