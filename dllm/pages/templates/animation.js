const MARKS = ["", " fresh", " inserted", " deleted"];   // of what a step has done
for (const root of document.querySelectorAll(".denoise")) {
  const { start, steps } = JSON.parse(root.querySelector("script").textContent);
  const pre = root.querySelector("pre"), slider = root.querySelector("[type=range]");
  const output = root.querySelector("output"), play = root.querySelector("[data-do=play]");
  const slots = start.map(() => pre.appendChild(document.createElement("span")));
  const frames = [start.map(text => ({ text }))];   // the whole canvas after each step, so that any can be jumped to
  for (const changes of steps) {
    const next = frames.at(-1).map(slot => ({ ...slot, fresh: 0 }));
    for (const [position, text, level, fresh] of changes)
      next[position] = { text, level, fresh, at: frames.length };
    frames.push(next);
  }
  let now = -1, timer = null;
  const show = step => {
    now = Math.max(0, Math.min(frames.length - 1, step));
    frames[now].forEach((slot, i) => {
      const mask = slot.text === null, committed = !mask && slot.level != null;
      slots[i].textContent = mask ? "\u00a0\u00a0" : slot.text;
      slots[i].className = "slot" + (mask ? " mask" : committed ? " l" + slot.level : slot.text === "" ? " gone" : "")
        + (slot.fresh && now < frames.length - 1 ? MARKS[slot.fresh] : "");
      if (committed) slots[i].dataset.at = slot.at; else delete slots[i].dataset.at;
    });
    slider.value = now;
    output.textContent = "step " + now + " of " + (frames.length - 1);
    root.dataset.step = now;
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  const go = () => {
    if (now === frames.length - 1) show(0);
    play.textContent = "Pause";
    const next = () => { show(now + 1); if (now === frames.length - 1) stop(); };
    timer = setInterval(next, Math.max(60, Math.min(400, 9000 / frames.length)));
  };
  const act = {
    play: () => timer ? stop() : go(),
    back: () => { stop(); show(now - 1); },
    on: () => { stop(); show(now + 1); },
  };
  for (const button of root.querySelectorAll("button")) button.addEventListener("click", act[button.dataset.do]);
  root.querySelector("[type=checkbox]").addEventListener("change",
    event => root.classList.toggle("order", event.target.checked));
  slider.max = frames.length - 1;
  slider.addEventListener("input", () => { stop(); show(+slider.value); });
  show(0);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) go();
}
