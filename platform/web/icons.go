package web

import (
	"fmt"
	"html/template"
)

// icons are drawn on a square of 24, by strokes.
var icons = map[string]string{
	"overview":  `<path d="M4 13h6V4H4zM14 20h6v-9h-6zM4 20h6v-3H4zM14 7h6V4h-6z"/>`,
	"relay":     `<path d="M4 12h4m8 0h4M12 4v4m0 8v4"/><circle cx="12" cy="12" r="4"/>`,
	"gateway":   `<path d="M5 21V10a7 7 0 0 1 14 0v11"/><path d="M3 21h18M12 21v-8m0 0-3 3m3-3 3 3"/>`,
	"client":    `<rect x="4" y="5" width="16" height="11" rx="1.5"/><path d="M2 20h20"/>`,
	"resource":  `<ellipse cx="12" cy="6" rx="7" ry="3"/><path d="M5 6v12c0 1.7 3.1 3 7 3s7-1.3 7-3V6M5 12c0 1.7 3.1 3 7 3s7-1.3 7-3"/>`,
	"policy":    `<path d="M12 3l7 3v5c0 4.6-3 8.3-7 10-4-1.7-7-5.4-7-10V6z"/><path d="m9 12 2.2 2.200L15.5 10"/>`,
	"group":     `<circle cx="9" cy="8" r="3.2"/><path d="M3 20c0-3.3 2.7-6 6-6s6 2.7 6 6M16 5.200a3.2 3.2 0 0 1 0 5.600M17.5 14.500c2.1.8 3.5 2.9 3.5 5.5"/>`,
	"session":   `<path d="M4 8h13m0 0-3-3m3 3-3 3M20 16H7m0 0 3-3m-3 3 3 3"/>`,
	"topology":  `<circle cx="5" cy="12" r="2.3"/><circle cx="19" cy="5" r="2.3"/><circle cx="19" cy="19" r="2.3"/><path d="M7 11 17 6M7 13l10 5"/>`,
	"history":   `<path d="M4 4v16h16"/><path d="m7 15 4-5 3 3 5-7"/>`,
	"cert":      `<circle cx="12" cy="9" r="5"/><path d="m9 13.5-1.5 7L12 18l4.5 2.5-1.5-7"/>`,
	"flow":      `<path d="M3 7c6 0 6 10 12 10h6m0 0-3-3m3 3-3 3M3 17c2.500 0 4-1.700 5.300-3.700M12.500 9.500C13.500 8 14.700 7 17 7h4"/>`,
	"hook":      `<path d="M12 4v9a4 4 0 1 1-4-4"/><circle cx="12" cy="4" r="1.500"/><path d="M15 15h6m0 0-3-3m3 3-3 3"/>`,
	"audit":     `<path d="M6 3h9l4 4v14H6z"/><path d="M9 11h7M9 15h7M9 7h3"/>`,
	"user":      `<circle cx="12" cy="8" r="4"/><path d="M4 21c0-4.4 3.6-7 8-7s8 2.6 8 7"/>`,
	"robot":     `<rect x="5" y="9" width="14" height="10" rx="2"/><path d="M12 9V5M9 14h.01M15 14h.01M2 13v3M22 13v3"/><circle cx="12" cy="4" r="1"/>`,
	"key":       `<circle cx="8" cy="15" r="4"/><path d="m11 12 8-8m-3 3 3 3"/>`,
	"sso":       `<path d="M10 4H5v16h5M14 8l4 4-4 4M18 12H9"/>`,
	"settings":  `<path d="M4 7h10m4 0h2M4 17h2m4 0h10"/><circle cx="16" cy="7" r="2"/><circle cx="8" cy="17" r="2"/>`,
	"search":    `<circle cx="11" cy="11" r="6"/><path d="m20 20-4.5-4.5"/>`,
	"menu":      `<path d="M4 7h16M4 12h16M4 17h16"/>`,
	"close":     `<path d="M6 6l12 12M18 6 6 18"/>`,
	"chevron":   `<path d="m8 10 4 4 4-4"/>`,
	"sun":       `<circle cx="12" cy="12" r="4"/><path d="M12 3v2m0 14v2M3 12h2m14 0h2M5.6 5.6 7 7m10 10 1.4 1.400M18.4 5.6 17 7M7 17l-1.4 1.4"/>`,
	"plus":      `<path d="M12 5v14M5 12h14"/>`,
	"copy":      `<rect x="9" y="9" width="11" height="11" rx="2"/><path d="M5 15H4V5a1 1 0 0 1 1-1h10v1"/>`,
	"help":      `<circle cx="12" cy="12" r="9"/><path d="M9.5 9.500a2.5 2.5 0 1 1 3.5 2.300c-.7.3-1 .8-1 1.700M12 17h.01"/>`,
	"info":      `<circle cx="12" cy="12" r="9"/><path d="M12 11v5M12 8h.01"/>`,
	"good":      `<circle cx="12" cy="12" r="9"/><path d="m8 12.5 2.8 2.700L16 9.5"/>`,
	"warn":      `<path d="M12 4 2.8 20h18.400z"/><path d="M12 10v4.500M12 17.500h.01"/>`,
	"bad":       `<path d="M8 3h8l5 5v8l-5 5H8l-5-5V8z"/><path d="m9 9 6 6m0-6-6 6"/>`,
	"drain":     `<path d="M5 5h14l-5 7v6l-4 2v-8z"/>`,
	"wait":      `<circle cx="12" cy="12" r="9"/><path d="M12 7v5l3 2"/>`,
	"off":       `<circle cx="12" cy="12" r="9"/><path d="m6 6 12 12"/>`,
	"out":       `<path d="M14 4h5v16h-5M10 8l-4 4 4 4M6 12h9"/>`,
	"download":  `<path d="M12 4v11m0 0-4-4m4 4 4-4M4 20h16"/>`,
	"arrow":     `<path d="M5 12h14m0 0-5-5m5 5-5 5"/>`,
	"lock":      `<rect x="5" y="11" width="14" height="10" rx="2"/><path d="M8 11V8a4 4 0 0 1 8 0v3"/>`,
	"building":  `<path d="M5 21V4h9v17M14 9h5v12M3 21h18M8 8h3M8 12h3M8 16h3"/>`,
	"device":    `<rect x="7" y="3" width="10" height="18" rx="2"/><path d="M11 18h2"/>`,
	"licence":   `<path d="M4 6h16v10H4z"/><path d="M8 10h6M8 13h3M16 16v5l-2-1.500L12 21v-5"/>`,
	"pulse":     `<path d="M3 12h4l3-7 4 14 3-7h4"/>`,
	"brandmark": `<path d="M4 21V6h3v2.500h2.500V6h5v2.500H17V6h3v15"/><path d="M9 21v-5a3 3 0 0 1 6 0v5M12 13.5"/><path d="M2.5 21h19"/>`,
}

// icon draws an icon. It says nothing to a screen reader: a word stands beside it.
func icon(name string) (template.HTML, error) {
	p, ok := icons[name]
	if !ok {
		return "", fmt.Errorf("there is no icon %q", name)
	}
	return template.HTML(`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false">` + p + `</svg>`), nil // constants alone
}
