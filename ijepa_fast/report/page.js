// Reads the values under the pointer out, in each chart's upper right corner.
for (const figure of document.querySelectorAll(".chart")) {
  const chart = JSON.parse(figure.dataset.chart), svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor"), output = figure.querySelector("output"), note = output.textContent;
  const [left, right, low, high] = chart.span;
  const readout = event => {
    const box = svg.getBoundingClientRect(), pixel = (event.clientX - box.left) / box.width * chart.width;
    const wanted = low + (pixel - left) / (right - left) * (high - low);
    let at = null;
    const values = chart.series.map(([name, xs, ys]) => {
      let best = 0;
      xs.forEach((x, i) => { if (Math.abs(x - wanted) < Math.abs(xs[best] - wanted)) best = i; });
      at ??= xs[best];
      return (chart.series.length > 1 ? name + " " : "") + ys[best];
    });
    const x = left + (at - low) / (high - low) * (right - left);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    output.textContent = chart.label + " " + Math.round(at) + ": " + values.join(", ");
  };
  const leave = () => {
    cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9);
    output.textContent = note;
  };
  svg.addEventListener("pointermove", readout);
  svg.addEventListener("pointerleave", leave);
}
// Marks where the reader is in the list of sections, which stays in sight.
const links = new Map([...document.querySelectorAll("nav a:not(.name)")].map(a => [a.getAttribute("href").slice(1), a]));
const sections = [...document.querySelectorAll("main section")];
const mark = () => {
  const passed = sections.filter(section => section.getBoundingClientRect().top < innerHeight / 3);
  const atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 2 && scrollY > 0;
  const here = atEnd ? sections.at(-1) : passed.at(-1);
  for (const [id, link] of links) {
    if (link.classList.toggle("here", here?.id === id)) {
      const list = link.parentElement;
      if (link.offsetLeft < list.scrollLeft || link.offsetLeft + link.offsetWidth > list.scrollLeft + list.clientWidth)
        list.scrollLeft = link.offsetLeft - 14;
    }
  }
};
addEventListener("scroll", mark, { passive: true });
mark();
