"""How a page looks: dark on light whatever the browser prefers, since the colours of losses are made for that."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body {
  margin: 0; background: #f6f7f9; color: #1f2328;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 30px 0 8px; }
h3 { font-size: 15px; margin: 0; overflow-wrap: anywhere; }
a { color: #0b57d0; text-decoration: none; }
a:hover { text-decoration: underline; }
p { margin: 6px 0; max-width: 80ch; overflow-wrap: anywhere; }
.note { color: #57606a; font-size: 13.5px; }
.card { background: #fff; border: 1px solid #d8dee4; border-radius: 10px; padding: 14px 16px; margin: 12px 0; }
.card > header { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; margin-bottom: 8px; }
.card > header .note { margin: 0; }
.columns { display: flex; gap: 16px; align-items: flex-start; }
.columns > .texts { flex: 1; min-width: 0; }
.images { display: flex; flex-wrap: wrap; gap: 8px; margin: 0 0 8px; max-width: 100%; }
.columns > .images { flex: 0 0 auto; max-width: 38%; }
figure { margin: 0; }
figure img {
  display: block; max-width: 100%; max-height: 256px; border: 1px solid #d8dee4; border-radius: 6px;
  background: #fff;
}
figure.small img { image-rendering: pixelated; }
figcaption { color: #57606a; font-size: 12px; max-width: 256px; overflow-wrap: anywhere; }
.tokens {
  font: 14px/1.95 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 440px; overflow-y: auto;
}
.tokens span, .swatch {
  unicode-bidi: isolate; border-radius: 3px; padding: 1px 0; color: #1f2328;
  box-shadow: inset -1px 0 0 #d0d7de;
}
.tokens .x { color: #57606a; background: #eef1f4; padding: 1px 3px; margin: 0 1px; box-shadow: none; }
.tokens .v { color: #5b3a00; background: #ffefcf; padding: 1px 5px; margin: 0 1px; box-shadow: none; }
.tokens .y, .swatch.y { background: #cfe8d5; border-bottom: 2px solid #1a7f37; }
.tokens .l0, .swatch.l0 { background: #e6f4ea; }
.tokens .l1, .swatch.l1 { background: #fff4c7; }
.tokens .l2, .swatch.l2 { background: #ffe0a3; }
.tokens .l3, .swatch.l3 { background: #ffc48a; }
.tokens .l4, .swatch.l4 { background: #ff9d7a; }
.tokens .l5, .swatch.l5 { background: #b42318; color: #fff; }
.tokens .l0, .tokens .l1, .tokens .l2, .tokens .l3,
.tokens .l4, .tokens .l5, .swatch {
  border-bottom: 2px solid #1f2328;
}
.swatch { padding: 1px 7px; margin-right: 4px; font-size: 12.5px; box-shadow: none; white-space: nowrap; }
.swatch.q { background: #fff; border: 1px solid #d0d7de; }
.swatch.v { background: #ffefcf; border-bottom: 0; }
.legend { margin: 8px 0; line-height: 2; font-size: 13px; color: #57606a; }
table { border-collapse: collapse; font-size: 13.5px; margin: 6px 0; }
th { text-align: left; font-weight: 600; color: #57606a; }
th, td { padding: 3px 14px 3px 0; vertical-align: top; overflow-wrap: anywhere; }
tbody tr { border-top: 1px solid #eaeef2; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td code {
  font: 13px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  unicode-bidi: isolate;
}
details { margin: 6px 0 0; font-size: 13.5px; }
summary { cursor: pointer; color: #57606a; }
.scroll { overflow: auto; max-height: 420px; }
.bad { color: #b42318; font-weight: 600; }
.good { color: #1a7f37; font-weight: 600; }
svg { display: block; max-width: 100%; height: auto; }
.charts { display: flex; flex-wrap: wrap; gap: 10px; }
.facts td:first-child { color: #57606a; }
.said { margin: 0 0 6px; }
.said b { color: #57606a; font-weight: 600; font-size: 12.5px; }
svg text { font: 11px system-ui, "DejaVu Sans", sans-serif; fill: #57606a; }
svg text[fill] { fill: #b42318; }
@media (max-width: 700px) { .columns { flex-direction: column; } .columns > .images { max-width: 100%; } }
"""
