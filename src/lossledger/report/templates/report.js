(() => {
  "use strict";

  // Tabs: sections that follow each other without JavaScript and in print take one place here.
  const tabbed = (holder) => {
    const panels = [...holder.children].filter((child) => child.dataset.tab !== undefined);
    if (panels.length < 2) return;
    const list = document.createElement("div");
    list.className = "tablist";
    list.setAttribute("role", "tablist");
    list.setAttribute("aria-label", holder.dataset.tabs);
    const tabs = panels.map((panel, index) => {
      const tab = document.createElement("button");
      tab.type = "button";
      tab.textContent = panel.dataset.tab;
      tab.setAttribute("role", "tab");
      panel.id = panel.id || `${holder.id}-${index}`;
      tab.setAttribute("aria-controls", panel.id);
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-label", panel.dataset.tab);
      list.append(tab);
      return tab;
    });
    const choose = (chosen) =>
      tabs.forEach((tab, index) => {
        tab.setAttribute("aria-selected", String(index === chosen));
        tab.tabIndex = index === chosen ? 0 : -1;
        panels[index].hidden = index !== chosen;
      });
    list.addEventListener("click", (event) => {
      const index = tabs.indexOf(event.target);
      if (index >= 0) choose(index);
    });
    list.addEventListener("keydown", (event) => {
      const now = tabs.indexOf(event.target);
      const goal = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (now < 0 || goal === undefined) return;
      event.preventDefault();
      const next = (goal + tabs.length) % tabs.length;
      choose(next);
      tabs[next].focus();
    });
    holder.prepend(list);
    holder.classList.add("tabbed");
    choose(0);
  };

  // Sorting: by name, or by the number behind the text; what has no number stays last.
  const sortable = (table) => {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    const valueOf = (row, column) => {
      const cell = row.cells[column];
      return column === 0 ? cell.textContent.trim() : cell.dataset.value ? Number(cell.dataset.value) : null;
    };
    const compare = (one, other) =>
      typeof one === "string" ? one.localeCompare(other, undefined, { numeric: true }) : one - other;
    const sort = (column) => {
      const before = heads[column].getAttribute("aria-sort");
      const order = before === null ? (column ? "descending" : "ascending") : before === "descending" ? "ascending" : "descending";
      const sign = order === "ascending" ? 1 : -1;
      const known = original.filter((row) => valueOf(row, column) !== null);
      const unknown = original.filter((row) => valueOf(row, column) === null);
      known.sort((one, other) => sign * compare(valueOf(one, column), valueOf(other, column)));
      body.append(...known, ...unknown);
      heads.forEach((head) => head.removeAttribute("aria-sort"));
      heads[column].setAttribute("aria-sort", order);
    };
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(column));
      head.append(button);
    });
  };

  // Charts: the drawing of the page is replaced by one that shows numbers under the mouse.
  const said = document.createElement("div");
  said.className = "tooltip";
  said.hidden = true;
  const show = (_, event, __, value) => {
    said.hidden = value === null || value === undefined;
    if (said.hidden) return;
    const lines = Object.entries(value).map(([name, text]) => {
      const line = document.createElement("div");
      line.textContent = `${name}: ${text}`;
      return line;
    });
    said.replaceChildren(...lines);
    const right = Math.max(4, window.innerWidth - said.offsetWidth - 8);
    said.style.left = `${Math.min(event.clientX + 12, right)}px`;
    said.style.top = `${event.clientY + 14}px`;
  };
  const chart = (figure) => {
    const plot = figure.querySelector(".plot");
    const specification = JSON.parse(figure.querySelector("script").textContent);
    const drawn = document.createElement("div");
    const options = { mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false, tooltip: show };
    window.vegaEmbed(drawn, specification, options).then(() => {
      plot.replaceChildren(drawn);
      figure.dataset.drawn = "yes";
    });
  };

  document.querySelectorAll("[data-tabs]").forEach(tabbed);
  document.querySelectorAll("table.sortable").forEach(sortable);
  document.body.append(said);
  if (window.vegaEmbed) document.querySelectorAll("figure.chart:has(script)").forEach(chart);
})();
