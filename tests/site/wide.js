// What makes a page wider than its window.
const limit = arguments[0] + 1;
if (document.documentElement.scrollWidth <= limit) return [];
const over = [...document.querySelectorAll(".bd-main *")].filter((e) => e.getBoundingClientRect().right > limit);
return over.slice(-3).map((e) => e.tagName + "." + e.className + " " + e.textContent.trim().slice(0, 40)).concat(["page"]);
