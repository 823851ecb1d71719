// What a page can not do without a script: stay fresh, copy, and shortcuts. Every page works without this file.
"use strict";
(() => {
	const root = document.documentElement;

	// Copy buttons are hidden until there is a script to serve them.
	const say = (text) => {
		const box = document.getElementById("announce");
		if (box) box.textContent = text;
	};
	const arm = (within) => {
		for (const b of within.querySelectorAll("[data-copy]")) b.hidden = false;
	};
	document.addEventListener("click", async (ev) => {
		const b = ev.target.closest("[data-copy]");
		if (!b) return;
		const from = document.getElementById(b.dataset.copy);
		const text = from.textContent.trim();
		try {
			await navigator.clipboard.writeText(text);
		} catch {
			const sel = getSelection(), range = document.createRange();
			range.selectNodeContents(from);
			sel.removeAllRanges();
			sel.addRange(range);
			document.execCommand("copy");
		}
		const label = b.querySelector("[data-label]") || b;
		const before = label.textContent;
		label.textContent = "Copied";
		say("Copied to the clipboard");
		setTimeout(() => { label.textContent = before; }, 2000);
	});
	arm(document);

	// The code of an invitation stands behind the # of its link, which browsers send to nobody.
	const hash = document.querySelector("[data-from-hash]");
	if (hash && location.hash.length > 1 && !hash.value) {
		hash.value = decodeURIComponent(location.hash.slice(1));
		history.replaceState(null, "", location.pathname);
	}

	// Choices that take effect at once have a button for those without a script.
	for (const s of document.querySelectorAll("select[data-submit]")) {
		s.addEventListener("change", () => s.form.requestSubmit());
		const b = s.form.querySelector("[data-noscript]");
		if (b) b.hidden = true;
	}

	// Tests show how far they are: the answer is a sequence of the result's HTML, each with a record separator behind it.
	document.addEventListener("submit", async (ev) => {
		const f = ev.target, box = f.dataset.stream && document.getElementById(f.dataset.stream);
		if (!box || !window.TextDecoderStream) return;
		ev.preventDefault();
		const b = f.querySelector("button");
		b.disabled = true;
		try {
			const r = await fetch(f.action, { method: "POST", body: new URLSearchParams(new FormData(f)), headers: { "X-Sallyway-Stream": "1" }, redirect: "manual" });
			if (r.type === "opaqueredirect") { location.reload(); return; }
			const from = r.body.pipeThrough(new TextDecoderStream()).getReader();
			for (let text = "";;) {
				const { value, done } = await from.read();
				if (done) {
					if (text) box.textContent = r.ok ? text : "The platform answered " + r.status + ": reload the page and try again.";
					break;
				}
				const frames = (text + value).split("\x1e");
				text = frames.pop();
				if (frames.length) box.innerHTML = frames[frames.length - 1];
			}
			box.scrollIntoView({ block: "nearest" });
		} catch {
			box.textContent = "The connection to the platform was lost: try again.";
		} finally {
			b.disabled = false;
		}
	});

	// Live pages: the server says that something changed, the page is read again, and the regions that differ are replaced. A region that
	// somebody works in (focus inside, an open question) is left alone until the next time.
	const live = document.body.dataset.live;
	let timer = 0, busy = false, again = false;
	const refresh = async () => {
		timer = 0;
		if (busy) { again = true; return; }
		busy = true;
		try {
			const r = await fetch(location.href, { headers: { "X-Sallyway-Live": "1" }, redirect: "manual" });
			if (!r.ok) return;
			const fresh = new DOMParser().parseFromString(await r.text(), "text/html");
			// An empty list that fills, a step that is done: the page has other regions now.
			const names = (d) => [...d.querySelectorAll("[data-region]")].map((e) => e.dataset.region).join();
			const main = document.querySelector("main"), freshMain = fresh.querySelector("main");
			if (freshMain && names(document) !== names(fresh)) {
				if (main.querySelector("details.confirm[open]") || main.contains(document.activeElement) && document.activeElement.matches("input, select, textarea")) return;
				main.innerHTML = freshMain.innerHTML;
				arm(main);
				return;
			}
			for (const old of document.querySelectorAll("[data-region]")) {
				const now = fresh.querySelector('[data-region="' + CSS.escape(old.dataset.region) + '"]');
				if (!now || now.innerHTML === old.innerHTML) continue;
				if (old.contains(document.activeElement) && document.activeElement.matches("input, select, textarea")) continue;
				if (old.querySelector("details.confirm[open]")) continue;
				const keep = document.activeElement && old.contains(document.activeElement) ? document.activeElement.id : "";
				old.innerHTML = now.innerHTML;
				arm(old);
				if (keep) document.getElementById(keep)?.focus();
				if (old.dataset.say) say(old.querySelector("[data-say]")?.dataset.say || "");
			}
		} catch { /* the next event tries again */ } finally {
			busy = false;
			if (again) { again = false; later(); }
		}
	};
	const later = () => { if (!timer && !document.hidden) timer = setTimeout(refresh, 250); };
	if (live && window.EventSource) {
		let source;
		const open = () => {
			source = new EventSource(live);
			source.addEventListener("change", later);
			source.onopen = () => { root.dataset.liveState = "on"; };
			source.onerror = () => {
				root.dataset.liveState = "off";
				if (source.readyState === EventSource.CLOSED) setTimeout(open, 5000);
			};
		};
		open();
		addEventListener("pagehide", () => source.close());
		document.addEventListener("visibilitychange", () => { if (!document.hidden) later(); });
	}

	// Menus close at Escape and at a click elsewhere.
	const menus = "details.who[open], details.switcher[open], details.confirm[open]";
	document.addEventListener("click", (ev) => {
		for (const d of document.querySelectorAll(menus)) if (!d.contains(ev.target)) d.open = false;
	});

	// Shortcuts: / searches, g and a letter goes somewhere, ? shows them.
	let going = 0;
	document.addEventListener("keydown", (ev) => {
		if (ev.key === "Escape") {
			for (const d of document.querySelectorAll(menus)) { d.open = false; d.querySelector("summary").focus(); }
			return;
		}
		if (ev.ctrlKey || ev.metaKey || ev.altKey || ev.target.matches("input, select, textarea, [contenteditable]")) return;
		if (Date.now() - going < 1200) {
			going = 0;
			const a = document.querySelector('[data-go="' + CSS.escape(ev.key) + '"]');
			if (a) { ev.preventDefault(); a.click(); }
			return;
		}
		if (ev.key === "/") {
			const s = document.querySelector("input[type=search]");
			if (s) { ev.preventDefault(); s.focus(); s.select(); }
		} else if (ev.key === "g") {
			going = Date.now();
		} else if (ev.key === "?") {
			document.getElementById("shortcuts")?.showModal();
		}
	});
	document.addEventListener("click", (ev) => {
		if (ev.target.closest("[data-shortcuts]")) document.getElementById("shortcuts")?.showModal();
	});
	for (const e of document.querySelectorAll("[data-needs-script]")) e.hidden = false;
})();
