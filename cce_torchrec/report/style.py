"""How a page looks, in light and dark and on paper; and a script for hovering, without which the
browser's own tips say the same."""

# Colours have a contrast of 3 to 1 or more to their ground, text of 4.5 to 1.
STYLE = """
:root{--bg:#fff;--panel:#f6f8fa;--ink:#1b1f24;--muted:#57606a;--edge:#d0d7de;--grid:#e4e8ec;
--accent:#0b62c4;--good:#116329;--bad:#b42318;--wait:#7a5200;--mark:#8c959f;
--c0:#0b62c4;--c1:#c2410c;--c2:#0f7b4f;--c3:#8b3fa8;--c4:#7a5200;--c5:#087e8b;--c6:#b8236b;
--c7:#5b6470;--full:#c6ced6;--differs:#fff4d6}
@media (prefers-color-scheme:dark){:root{--bg:#14171c;--panel:#1c2128;--ink:#e6e9ed;--muted:#a5afba;
--edge:#39424d;--grid:#2b323b;--accent:#6cb2ff;--good:#5fd39b;--bad:#ff8f85;--wait:#e3c04f;
--mark:#7d8894;--c0:#6cb2ff;--c1:#ff9d5c;--c2:#5fd39b;--c3:#d49bff;--c4:#e3c04f;--c5:#58d0dc;
--c6:#ff8fc0;--c7:#aab4c0;--full:#46505c;--differs:#3a3219}}
*{box-sizing:border-box}
html{scroll-behavior:smooth}
body{margin:0 auto;max-width:1180px;padding:1.25rem clamp(.75rem,3vw,2rem) 4rem;
background:var(--bg);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.55rem;line-height:1.25;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.4rem 0 .8rem;padding-bottom:.3rem;border-bottom:1px solid var(--edge)}
h3{font-size:1rem;margin:1.3rem 0 .5rem;overflow-wrap:anywhere}
.when,.none{color:var(--muted);overflow-wrap:anywhere;margin:.2rem 0}
.when{font-size:.85rem}
a{color:var(--accent)}
nav ul{list-style:none;margin:1rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.35rem .9rem;
font-size:.9rem}
.state{border:1px solid var(--edge);border-left:5px solid var(--muted);border-radius:6px;
background:var(--panel);padding:.6rem .9rem;margin:.9rem 0 0}
.state p{margin:.2rem 0;overflow-wrap:anywhere;white-space:pre-wrap}
.state b::first-letter{text-transform:uppercase}
.state.failed{border-left-color:var(--bad)}.state.failed>b,.badge.failed{color:var(--bad)}
.state.running,.state.unknown{border-left-color:var(--wait)}
.state.running>b,.state.unknown>b,.badge.running,.badge.unknown{color:var(--wait)}
.badge{font-weight:600}.badge.finished{color:var(--good)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.7rem;margin:0}
.tiles div{background:var(--panel);border:1px solid var(--edge);border-radius:8px;
padding:.6rem .8rem}
.tiles dt{color:var(--muted);font-size:.82rem}
.tiles dd{margin:.1rem 0 0;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:1rem}
figure{margin:0;border:1px solid var(--edge);border-radius:8px;background:var(--panel);
padding:.7rem .8rem .6rem;min-width:0}
figure.empty{display:flex;flex-direction:column;gap:.4rem}
figcaption{display:flex;flex-wrap:wrap;gap:0 .6rem;align-items:baseline;margin-bottom:.2rem;
overflow-wrap:anywhere}
figcaption span{color:var(--muted);font-size:.82rem}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--muted);font-size:13px;font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--grid)}svg .axis{stroke:var(--muted)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}
svg .line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .dashed{stroke-dasharray:6 5}svg .dotted{stroke-dasharray:1 5}
svg .faint{stroke-width:1.4;opacity:.62}
svg .mark{stroke:var(--c,var(--mark));stroke-width:1;stroke-dasharray:3 4;opacity:.75}
svg .hit{fill:transparent;pointer-events:all}
svg .dot{fill:var(--c);stroke:var(--panel);stroke-width:1}
svg .bar{fill:var(--c);opacity:.8}
svg .hit:hover{fill:var(--c);opacity:1}
.legend{list-style:none;margin:.35rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.1rem 1rem;
font-size:.84rem}
.legend li{display:flex;align-items:center;gap:.4rem;overflow-wrap:anywhere;min-width:0}
.key{display:inline-block;flex:none;width:20px;height:0;border-top:3px solid var(--c);
vertical-align:middle;margin-right:.3rem}
.key.dashed{border-top-style:dashed}.key.dotted{border-top-style:dotted}
.key.faint{border-top-width:2px;opacity:.62}.key.bar{height:10px;border:0;width:12px;
background:var(--c)}
.scroll{overflow-x:auto;border:1px solid var(--edge);border-radius:8px;margin:.6rem 0}
.scroll:focus-visible{outline:2px solid var(--accent)}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.36rem .7rem;text-align:left;border-top:1px solid var(--grid);vertical-align:top}
thead th{background:var(--panel);border-top:0;color:var(--muted);font-weight:600;white-space:nowrap}
tbody th{font-weight:500}
.number{text-align:right;white-space:nowrap}
.settings td,.settings th{overflow-wrap:anywhere;min-width:6rem}
tr.differs{background:var(--differs)}
.bars{list-style:none;margin:.5rem 0;padding:0;display:grid;gap:.55rem}
.bars li{display:grid;grid-template-columns:minmax(90px,180px) 1fr minmax(110px,auto);
gap:.2rem .8rem;
align-items:center}
.bars .table-name{overflow-wrap:anywhere;font-size:.9rem}
.bars .bytes{font-size:.84rem;color:var(--muted);text-align:right;font-variant-numeric:tabular-nums}
.track{display:flex;height:9px;margin:2px 0}
.box{display:block;height:100%}
.legend .box{width:12px;height:10px;flex:none}
.box.rows{background:var(--c0)}.box.codes{background:var(--c1)}.box.optimizer{background:var(--c2)}
.box.full{background:var(--full)}
details{border:1px solid var(--edge);border-radius:8px;padding:.5rem .8rem;margin:.7rem 0}
summary{cursor:pointer}
summary span{color:var(--muted);font-size:.85rem;margin-left:.7rem}
details[open]>summary{margin-bottom:.6rem}
.warnings{margin:.2rem 0 .8rem;padding-left:1.2rem;color:var(--wait)}
pre{overflow-x:auto;background:var(--panel);border-radius:6px;padding:.7rem;font-size:.84rem;
margin:0}
#tip{position:fixed;z-index:9;pointer-events:none;max-width:18rem;padding:.25rem .55rem;
font-size:.82rem;
border-radius:5px;background:var(--ink);color:var(--bg)}
@media (max-width:560px){body{font-size:14px}svg text{font-size:17px}
.bars li{grid-template-columns:1fr auto}.bars li>span:nth-child(2){grid-column:1/-1;grid-row:2}
.tiles{grid-template-columns:1fr 1fr}summary span{display:block;margin-left:0}
td,th{padding:.34rem .5rem}}
@media print{body{max-width:none;padding:0;font-size:11px}nav{display:none}
figure,.tiles div,tr,.bars li{break-inside:avoid}h2{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.charts{grid-template-columns:1fr 1fr}.scroll{overflow:visible}
@page{margin:14mm}}
"""

# Tips come at once, and on touch, which those of browsers do not.
SCRIPT = """
(function () {
  var tip = document.getElementById("tip");
  document.querySelectorAll(".hit > title, .mark > title").forEach(function (title) {
    title.parentNode.setAttribute("data-said", title.textContent);
    title.remove();
  });
  document.addEventListener("pointermove", function (event) {
    var said = event.target.getAttribute && event.target.getAttribute("data-said");
    tip.hidden = !said;
    if (!said) return;
    tip.textContent = said;
    var left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 6);
    tip.style.left = Math.max(6, left) + "px";
    tip.style.top = Math.max(6, event.clientY - tip.offsetHeight - 12) + "px";
  });
})();
"""
