// Everything one look at a page needs, once MathJax has set it.
const done = arguments[arguments.length - 1];
const ready = window.MathJax && MathJax.startup && MathJax.startup.promise || Promise.resolve();
ready.then(() => document.fonts.ready).then(() => {
  const maths = [...document.querySelectorAll("span.math, div.math")];
  done({
    maths: maths.length,
    unset: maths.filter((m) => !m.querySelector("mjx-container")).map((m) => m.textContent.slice(0, 60)),
    scrolls: maths.filter((m) => m.tagName === "SPAN" && innerWidth > 1000 && /auto|scroll/.test(getComputedStyle(m).overflowX)).map((m) => m.textContent.slice(0, 60)),
    wrong: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map((m) => m.textContent.slice(0, 60)),
    raw: [...document.querySelectorAll(".bd-article p, .bd-article li, .bd-article td, .bd-article figcaption")]
      .filter((e) => !e.closest("pre, .highlight"))
      .map((e) => [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent).join(" "))
      .filter((t) => /\$[^$\s][^$]*\$|\\\(.+\\\)|\{[a-z]+\}`/.test(t)).map((t) => t.slice(0, 60)),
    images: [...document.images].filter((i) => i.ariaHidden !== "true" && !(i.getAttribute("alt") || "").trim()).map((i) => i.src.slice(-60)),
    broken: [...document.images].filter((i) => i.getAttribute("src") && i.complete && !i.naturalWidth && i.loading !== "lazy").map((i) => i.src.slice(-60)),
  });
}, (error) => done({ error: String(error) }));
