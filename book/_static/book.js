// Filters of the generated pages: every entry carries its theme, chapter, state and words in data attributes.
document.addEventListener("DOMContentLoaded", () => {
  const form = document.querySelector("form.fg-filter");
  if (!form) return;
  const entries = [...document.querySelectorAll("[data-fg-entry]")];
  const total = form.querySelector("output");
  const fields = [...form.querySelectorAll("select, input")];
  const query = new URLSearchParams(location.search);
  fields.forEach((field) => { if (query.has(field.name)) field.value = query.get(field.name); });
  const apply = () => {
    const wanted = Object.fromEntries(fields.map((field) => [field.name, field.value.trim().toLowerCase()]));
    let shown = 0;
    entries.forEach((entry) => {
      const hit = (!wanted.theme || entry.dataset.theme === wanted.theme)
        && (!wanted.state || entry.dataset.state === wanted.state)
        && (!wanted.words || wanted.words.split(/\s+/).every((word) => entry.textContent.toLowerCase().includes(word)));
      entry.hidden = !hit;
      shown += hit;
    });
    document.querySelectorAll("[data-fg-group]").forEach((group) => {
      const section = group.closest("section") || group;
      section.hidden = !section.querySelector("[data-fg-entry]:not([hidden])");
    });
    total.textContent = `${shown} of ${entries.length} shown`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
});
