for (const box of document.querySelectorAll(".compare")) {
  const input = box.querySelector("input");
  const split = value => { input.value = value; box.style.setProperty("--split", value + "%"); };
  const follow = event => {
    const area = box.getBoundingClientRect();
    split(Math.min(100, Math.max(0, 100 * (event.clientX - area.left) / area.width)));
  };
  input.addEventListener("input", () => split(input.value));
  box.addEventListener("pointerdown", event => {
    event.preventDefault();
    box.setPointerCapture(event.pointerId);
    input.focus({preventScroll: true});
    follow(event);
  });
  box.addEventListener("pointermove", event => { if (box.hasPointerCapture(event.pointerId)) follow(event); });
  for (const button of box.nextElementSibling.querySelectorAll("button"))
    button.addEventListener("click", () => {
      const {side, show} = button.dataset;
      for (const image of box.querySelectorAll("img")) image.classList.toggle(side, image.dataset.show === show);
      for (const other of button.parentElement.querySelectorAll("button"))
        other.setAttribute("aria-pressed", other === button);
      box.querySelector("b." + side).textContent = button.textContent;
    });
}
