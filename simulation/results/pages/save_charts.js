// Make each PNG link save the chart of its figure: the caption and the SVG, in the light colours, on white.
for (const link of document.querySelectorAll("a.png")) {
  link.hidden = false;
  link.addEventListener("click", async event => {
    if (link.href.startsWith("blob:")) return;
    event.preventDefault();
    link.href = URL.createObjectURL(await pngOf(link.closest("figure")));
    link.click();
  });
}

async function pngOf(figure) {
  const light = document.styleSheets[0].cssRules[0].style, colour = name => light.getPropertyValue("--" + name).trim();
  const svg = figure.querySelector("svg"), [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  const copy = svg.cloneNode(true), margin = 8, line = 17, scale = 3;
  copy.setAttribute("width", width * scale);
  copy.setAttribute("height", height * scale);
  copy.style.fontFamily = "sans-serif";
  const text = new XMLSerializer().serializeToString(copy).replace(/var\(--([\w-]+)\)/g, (_, name) => colour(name));
  const image = new Image(), canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
  await image.decode();
  const font = pen.font = "12px sans-serif";
  let x = margin, y = line;
  const words = [...figure.querySelectorAll("figcaption > *")].map(each => {
    const text = [each.dataset.name || "", each.textContent].join(" ").trim().replace(/\s+/g, " ");
    const label = text + "   ", space = pen.measureText(label).width;
    if (x > margin && x + space > width) [x, y] = [margin, y + line];
    x += space;
    return [label, x - space, y, [...each.classList].map(colour).find(Boolean) || colour("ink")];
  });
  canvas.width = width * scale;
  canvas.height = (y + margin + height) * scale;
  pen.scale(scale, scale);
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, y + margin + height);
  pen.font = font;
  for (const [label, left, base, fill] of words) {
    pen.fillStyle = fill;
    pen.fillText(label, left, base);
  }
  pen.drawImage(image, 0, y + margin, width, height);
  return new Promise(done => canvas.toBlob(done));
}
