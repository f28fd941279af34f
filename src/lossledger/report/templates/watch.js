(() => {
  "use strict";
  const shown = document.querySelector('meta[name="lossledger-version"]').content;
  const key = "lossledger-place";

  // What a reader chose, by name and not by position: sections may appear between two versions of the page.
  const named = (selector) => {
    const met = new Map();
    return [...document.querySelectorAll(selector)].map((element) => {
      const summary = element.querySelector(":scope > summary");
      const name = element.id || `${element.name || ""} ${element.value || ""} ${(summary || element).textContent.trim()}`;
      met.set(name, (met.get(name) || 0) + 1);
      return [`${name} ${met.get(name)}`, element];
    });
  };
  const details = () => named("details");
  const choices = () => named("input[type=radio], input[type=checkbox], select");
  const tabs = () => named("[role=tab]");

  const keep = () => {
    const place = {
      x: scrollX,
      y: scrollY,
      open: details().map(([name, element]) => [name, element.open]),
      chosen: choices().map(([name, element]) => [name, element.type === "select-one" ? element.value : element.checked]),
      tabs: tabs().filter(([, element]) => element.getAttribute("aria-selected") === "true").map(([name]) => name),
    };
    sessionStorage.setItem(key, JSON.stringify(place));
  };

  const restore = () => {
    const found = sessionStorage.getItem(key);
    sessionStorage.removeItem(key);
    if (!found) return;
    const place = JSON.parse(found);
    const open = new Map(place.open);
    const chosen = new Map(place.chosen);
    for (const [name, element] of details()) if (open.has(name)) element.open = open.get(name);
    for (const [name, element] of choices()) {
      if (!chosen.has(name)) continue;
      const property = element.type === "select-one" ? "value" : "checked";
      if (element[property] === chosen.get(name)) continue;
      element[property] = chosen.get(name);
      element.dispatchEvent(new Event("change", { bubbles: true }));
    }
    for (const [name, element] of tabs()) {
      if (place.tabs.includes(name) && element.getAttribute("aria-selected") !== "true") element.click();
    }
    history.scrollRestoration = "manual";
    // Charts are drawn late and change the height: follow it until the place is reached or the reader moves.
    const there = () => scrollTo({ left: place.x, top: place.y, behavior: "instant" });
    const watcher = new ResizeObserver(there);
    const stop = () => watcher.disconnect();
    for (const event of ["wheel", "touchstart", "keydown", "pointerdown"]) {
      addEventListener(event, stop, { once: true, passive: true });
    }
    setTimeout(stop, 2000);
    watcher.observe(document.body);
    there();
  };

  const reload = () => {
    keep();
    location.reload();
  };

  restore();
  const source = new EventSource("events");
  source.onmessage = (event) => {
    if (event.data === shown) return;
    source.close();
    // A page that nobody sees waits until somebody does.
    if (!document.hidden) reload();
    else document.addEventListener("visibilitychange", reload, { once: true });
  };
  source.addEventListener("end", () => {
    source.close();
    const note = document.createElement("p");
    note.setAttribute("role", "status");
    note.textContent = "The watch has ended; this page is no longer updated.";
    note.style.cssText = "position:fixed;right:1rem;bottom:1rem;margin:0;padding:.5rem .8rem;border-radius:.4rem;" +
      "background:#333;color:#fff;font:14px system-ui,sans-serif";
    document.body.append(note);
  });
})();
