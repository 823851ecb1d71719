package web

import (
	"fmt"
	"html/template"
	"strings"

	code "rsc.io/qr"
)

// qr is a picture of a text for a phone's camera.
type qr struct{ SVG template.HTML }

// qrOf draws a text, nil when it is too long: then it is typed.
func qrOf(text string) *qr {
	c, err := code.Encode(text, code.M)
	if err != nil {
		return nil
	}
	const quiet = 4 // modules around it (ISO/IEC 18004 §5.3.8)
	n := c.Size + 2*quiet
	var b strings.Builder
	fmt.Fprintf(&b, `<svg class="qr" viewBox="0 0 %d %d" role="img" aria-label="QR code of the secret"><path fill="#fff" d="M0 0h%dv%dH0z"/><path fill="#000" d="`, n, n, n, n)
	for y := range c.Size {
		for x := range c.Size {
			if c.Black(x, y) {
				fmt.Fprintf(&b, "M%d %dh1v1h-1z", x+quiet, y+quiet)
			}
		}
	}
	b.WriteString(`"/></svg>`)
	return &qr{template.HTML(b.String())} // numbers alone
}
