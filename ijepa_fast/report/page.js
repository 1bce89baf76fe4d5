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
