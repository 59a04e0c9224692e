if (location.protocol.startsWith("http"))
  setInterval(async () => {
    try {
      const answer = await fetch(location.href);
      if (!answer.ok) throw new Error(answer.statusText);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const scrolled = document.querySelector(".events").scrollTop;
      document.querySelector("main").replaceWith(page.querySelector("main"));
      document.querySelector(".events").scrollTop = scrolled;
      document.title = page.title;
      document.body.classList.remove("lost");
    } catch (error) {
      document.body.classList.add("lost");
      document.title = "no answer: " + document.querySelector("h1").textContent;
    }
  }, 5000);

document.addEventListener("pointermove", event => {
  const chart = event.target.closest("figure");
  if (!chart) return;
  const {left, right, edges} = JSON.parse(chart.dataset.span), area = chart.querySelector("svg").getBoundingClientRect();
  const across = ((event.clientX - area.left) / area.width - edges[0]) / (edges[1] - edges[0]);
  const step = left + Math.min(1, Math.max(0, across)) * (right - left);
  const near = points => points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
  const found = Object.entries(JSON.parse(chart.dataset.curves)).map(([name, points], number) => {
    const key = document.createElement("b");
    key.className = "c" + number % 6;
    key.textContent = name;
    return [key, " " + near(points)[1] + " at step " + near(points)[0] + " "];
  });
  chart.querySelector(".keys").replaceChildren(...found.flat());
});
