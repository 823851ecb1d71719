// What a page must not lack, as lines of text: names, labels, order of headings, contrast (WCAG 2.2 AA), no sideways scrolling, ids once.
(() => {
	const out = [];
	const shown = (e) => {
		if (!e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) return false;
		if (e.closest(".sr")) return false;
		const r = e.getBoundingClientRect();
		return r.width > 1 && r.height > 1;
	};
	const what = (e) => e.tagName.toLowerCase() + (e.id ? "#" + e.id : "") + (typeof e.className === "string" && e.className ? "." + e.className.split(" ").join(".") : "") + " " + JSON.stringify((e.textContent || e.value || "").trim().slice(0, 40));
	const name = (e) => {
		const by = e.getAttribute("aria-labelledby");
		if (by) return by.split(" ").map((i) => document.getElementById(i)?.textContent || "").join(" ").trim();
		return (e.getAttribute("aria-label") || [...(e.labels || [])].map((l) => l.textContent).join(" ") || e.textContent || e.alt || e.title || "").trim();
	};

	if (!document.documentElement.lang) out.push("the page has no language");
	if (!document.title.trim()) out.push("the page has no title");
	if (document.querySelectorAll("main").length !== 1) out.push("not exactly one main");
	if (document.querySelectorAll("h1").length !== 1) out.push(document.querySelectorAll("h1").length + " headings of level 1");
	let level = 1;
	for (const h of document.querySelectorAll("main h1, main h2, main h3, main h4")) {
		const l = +h.tagName[1];
		if (l > level + 1) out.push("a heading of level " + l + " follows one of " + level + ": " + what(h));
		level = l;
	}
	const ids = new Set();
	for (const e of document.querySelectorAll("[id]")) {
		if (ids.has(e.id)) out.push("the id " + e.id + " stands twice");
		ids.add(e.id);
	}
	for (const e of document.querySelectorAll("[aria-labelledby], [aria-describedby]")) {
		for (const a of ["aria-labelledby", "aria-describedby"]) {
			for (const i of (e.getAttribute(a) || "").split(" ").filter(Boolean)) if (!document.getElementById(i)) out.push(a + " names nothing: " + i);
		}
	}
	for (const e of document.querySelectorAll("a[href], button, summary, [role=button]")) {
		if (!name(e)) out.push("nothing says what this does: " + e.outerHTML.slice(0, 120));
	}
	for (const e of document.querySelectorAll("input:not([type=hidden]), select, textarea")) {
		if (!name(e)) out.push("a field has no label: " + e.outerHTML.slice(0, 120));
	}
	for (const e of document.querySelectorAll("svg")) {
		if (e.getAttribute("aria-hidden") !== "true" && !e.getAttribute("aria-label")) out.push("a picture has no name: " + e.outerHTML.slice(0, 100));
	}
	for (const e of document.querySelectorAll("th")) if (!e.hasAttribute("scope")) out.push("a table's heading has no scope: " + what(e));
	for (const e of document.querySelectorAll("[style]")) out.push("an inline style: " + e.outerHTML.slice(0, 100));
	for (const e of document.querySelectorAll("form")) {
		if (e.method === "post" && document.querySelector("aside") && !e.querySelector("[name=csrf]")) out.push("a form without a token: " + e.outerHTML.slice(0, 100));
	}
	if (document.documentElement.scrollWidth > innerWidth + 1) {
		const wide = [...document.querySelectorAll("main *")].filter((e) => shown(e) && e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".tablewrap, .scroll, pre"));
		out.push("the page scrolls sideways (" + document.documentElement.scrollWidth + " of " + innerWidth + "): " + (wide.length ? what(wide[wide.length - 1]) : ""));
	}
	if (matchMedia("(max-width: 44rem)").matches) {
		for (const e of document.querySelectorAll("button, .button, summary, nav a")) {
			if (!shown(e)) continue;
			const r = e.getBoundingClientRect();
			if (r.height < 24 || r.width < 24) out.push("too small to touch (" + Math.round(r.width) + "×" + Math.round(r.height) + "): " + what(e));
		}
	}

	// Contrast: every text against what is painted behind it.
	const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
	const cache = new Map();
	const rgba = (c) => {
		if (!cache.has(c)) {
			canvas.clearRect(0, 0, 1, 1);
			canvas.fillStyle = "#000";
			canvas.fillStyle = c;
			canvas.fillRect(0, 0, 1, 1);
			const d = canvas.getImageData(0, 0, 1, 1).data;
			cache.set(c, [d[0], d[1], d[2], d[3] / 255]);
		}
		return cache.get(c);
	};
	const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
	const behind = (e) => {
		const layers = [];
		for (; e; e = e.parentElement) {
			const c = rgba(getComputedStyle(e).backgroundColor);
			if (c[3] > 0) layers.push(c);
			if (c[3] === 1) break;
		}
		let base = [255, 255, 255, 1];
		for (const l of layers.reverse()) base = over(l, base);
		return base;
	};
	const lum = (c) => [0, 1, 2].map((i) => { const v = c[i] / 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
	const ratio = (a, b) => { const [x, y] = [lum(a), lum(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
	const seen = new Set();
	const judge = (e, color, back, least) => {
		const r = ratio(over(color, back), back);
		if (r + .005 < least) {
			const line = "contrast " + r.toFixed(2) + " below " + least + ": " + what(e);
			if (!seen.has(line)) { seen.add(line); out.push(line); }
		}
	};
	const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
	for (let n = walk.nextNode(); n; n = walk.nextNode()) {
		const e = n.parentElement;
		if (!n.textContent.trim() || !shown(e) || e.closest("option, script, :disabled")) continue;
		const s = getComputedStyle(e), size = parseFloat(s.fontSize), bold = +s.fontWeight >= 700;
		const least = size >= 24 || bold && size >= 18.66 ? 3 : 4.5;
		judge(e, rgba(e.closest("svg") ? s.fill : s.color), behind(e.closest("svg") || e), least);
	}
	for (const e of document.querySelectorAll("input:not([type=hidden]):not([type=checkbox]):not([type=radio]), select, textarea")) {
		if (!shown(e)) continue;
		const s = getComputedStyle(e);
		judge(e, rgba(s.color), behind(e), 4.5);
		if (e.placeholder) judge(e, rgba(getComputedStyle(e, "::placeholder").color), behind(e), 4.5);
		judge(e, rgba(s.borderTopColor), behind(e.parentElement), 3); // WCAG 1.4.11
	}
	return out;
})()
