package web

import (
	"cmp"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"sallyway/internal/identity"
)

// Measures of the picture, in units of its view box.
const (
	topoColumns = 4
	topoWidth   = 1000
	topoBox     = 190
	topoRow     = 50
	topoHeight  = 34 // of a box
	topoTop     = 34
	topoMost    = 16 // boxes in a column; more is found by choosing a subject or a resource
)

// topoNode is a box.
type topoNode struct {
	col    int
	key    string // kind:name
	name   string
	url    string
	state  stateView
	weight float64 // where it stands in its column: lower is higher
	y      float64
}

// topo is a picture of who reaches what through which relay.
type topo struct {
	nodes map[string]*topoNode
	cols  [topoColumns][]*topoNode
	edges map[[2]string]string // class
	more  [topoColumns]int
}

var topoTitles = [topoColumns]string{"WHO", "RELAYS", "GATEWAYS", "RESOURCES"}

func (t *topo) add(col int, key, name, url string, state stateView) *topoNode {
	if n := t.nodes[key]; n != nil {
		return n
	}
	n := &topoNode{col: col, key: key, name: name, url: url, state: state}
	t.nodes[key] = n
	t.cols[col] = append(t.cols[col], n)
	return n
}

// edge keeps the strongest class that two boxes are joined by.
func (t *topo) edge(from, to, class string) {
	rank := []string{"standby", "", "live"}
	k := [2]string{from, to}
	if old, known := t.edges[k]; known && slices.Index(rank, old) >= slices.Index(rank, class) {
		return
	}
	t.edges[k] = class
}

func (q *request) topology() error {
	reach, err := q.s.reg.Reach(q.ctx, q.org)
	if err != nil {
		return err
	}
	sessions, err := q.s.reg.Sessions(q.ctx, q.org)
	if err != nil {
		return err
	}
	chosenSubject, chosenResource := q.value("subject"), q.value("resource")
	states, err := q.s.reg.NodeStates(q.ctx, q.org)
	if err != nil {
		return err
	}
	look := func(kind identity.Kind, name string) stateView { return stateViews[states[string(kind)+":"+name]] }
	t := &topo{nodes: make(map[string]*topoNode), edges: make(map[[2]string]string)}
	live := make(map[[3]string]bool) // subject name, gateway, relay
	for _, s := range sessions {
		relay, _ := via(s.Relay)
		live[[3]string{s.Peer, s.Gateway, relay}] = true
	}
	type line struct{ Subject, Resource, Gateway, Relay, Standby string }
	var lines []line
	nodeURL := func(kind identity.Kind, name string) string {
		return q.url("networking", string(kind)+"s", url.PathEscape(name))
	}
	for _, subject := range reach.SubjectNames() {
		kind, name, _ := strings.Cut(subject, ":")
		if chosenSubject != "" && subject != chosenSubject {
			continue
		}
		for _, resource := range reach.Subjects[subject] {
			if chosenResource != "" && resource != chosenResource {
				continue
			}
			for _, gateway := range reach.Gateways[resource] {
				relays := reach.Relays[gateway]
				s := t.add(0, subject, name, nodeURL(identity.Kind(kind), name), look(identity.Kind(kind), name))
				r := t.add(3, "resource:"+resource, resource, q.url("resources", url.PathEscape(resource)), stateView{})
				g := t.add(2, "at:"+gateway, gateway, nodeURL(identity.Gateway, gateway), look(identity.Gateway, gateway))
				t.edge(g.key, r.key, "")
				l := line{Subject: subject, Resource: resource, Gateway: gateway}
				for i, relay := range relays {
					state := look(identity.Relay, relay)
					if state.Word == "" {
						state = stateView{"Shared", "good", "good"}
					}
					n := t.add(1, "relay:"+relay, relay, nodeURL(identity.Relay, relay), state)
					class := ""
					if i > 0 {
						class = "standby"
						l.Standby = relay
					} else {
						l.Relay = relay
					}
					if live[[3]string{name, gateway, relay}] {
						class = "live"
					}
					t.edge(s.key, n.key, class)
					t.edge(n.key, g.key, class)
				}
				if live[[3]string{name, gateway, "direct"}] {
					t.edge(s.key, g.key, "live")
				}
				lines = append(lines, l)
			}
		}
	}
	c, err := q.choices()
	if err != nil {
		return err
	}
	t.arrange()
	const most = 200
	return q.render(http.StatusOK, "topology", page{Title: "Topology", Nav: "topology", Live: true, Data: struct {
		SVG      template.HTML
		Empty    bool
		Lines    []line
		More     int
		Hidden   string
		Subjects []string
		Choices  *choices
		Subject  string
		Resource string
	}{t.draw(), len(t.nodes) == 0, lines[:min(len(lines), most)], max(0, len(lines)-most), t.hidden(), reach.SubjectNames(), c, chosenSubject, chosenResource}})
}

// arrange decides which boxes are drawn and where, so that edges cross little: each column follows the one before.
func (t *topo) arrange() {
	byName := func(a, b *topoNode) int { return strings.Compare(a.key, b.key) }
	slices.SortFunc(t.cols[1], byName)
	for i, n := range t.cols[1] {
		n.weight = float64(i)
	}
	// near are the boxes that a box follows: those before it, for the first column those after it.
	near := make(map[string][]*topoNode, len(t.nodes))
	for k, class := range t.edges {
		from, to := t.nodes[k[0]], t.nodes[k[1]]
		if class == "standby" || from == nil || to == nil {
			continue
		}
		near[to.key] = append(near[to.key], from)
		if from.col == 0 {
			near[from.key] = append(near[from.key], to)
		}
	}
	for _, col := range []int{2, 3, 0} {
		for _, n := range t.cols[col] {
			sum := 0.0
			for _, o := range near[n.key] {
				sum += o.weight
			}
			if count := len(near[n.key]); count > 0 {
				n.weight = sum / float64(count)
			}
		}
		slices.SortFunc(t.cols[col], func(a, b *topoNode) int { return cmp.Or(cmp.Compare(a.weight, b.weight), byName(a, b)) })
		for i, n := range t.cols[col] {
			n.weight = float64(i)
		}
	}
	rows := 0
	for i, col := range t.cols {
		if len(col) > topoMost {
			t.more[i] = len(col) - topoMost
			for _, n := range col[topoMost:] {
				delete(t.nodes, n.key)
			}
			t.cols[i] = col[:topoMost]
		}
		rows = max(rows, len(t.cols[i]))
	}
	for _, col := range t.cols {
		gap := float64(rows-len(col)) / 2
		for i, n := range col {
			n.y = topoTop + (float64(i)+gap)*topoRow
		}
	}
}

func (t *topo) hidden() string {
	var parts []string
	for i, what := range [topoColumns][2]string{{"client", "clients"}, {"relay", "relays"}, {"gateway", "gateways"}, {"resource", "resources"}} {
		if t.more[i] > 0 {
			parts = append(parts, plural(t.more[i], what[0], what[1]))
		}
	}
	return strings.Join(parts, ", ")
}

func (t *topo) draw() template.HTML {
	rows := 0
	for _, col := range t.cols {
		rows = max(rows, len(col))
	}
	height := topoTop + rows*topoRow + 6
	x := func(col int) float64 { return float64(col) * (topoWidth - topoBox) / (topoColumns - 1) }
	var b strings.Builder
	fmt.Fprintf(&b, `<svg class="picture topo" viewBox="0 0 %d %d" role="group" aria-label="Who reaches what through which relay; the same is in the table below">`, topoWidth, height)
	for i, title := range topoTitles {
		fmt.Fprintf(&b, `<text class="col" x="%.0f" y="18">%s</text>`, x(i)+2, title)
	}
	keys := make([][2]string, 0, len(t.edges))
	for k := range t.edges {
		if t.nodes[k[0]] != nil && t.nodes[k[1]] != nil {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, func(a, c [2]string) int { return strings.Compare(a[0]+a[1], c[0]+c[1]) })
	for _, k := range keys {
		from, to := t.nodes[k[0]], t.nodes[k[1]]
		x1, y1 := x(from.col)+topoBox, from.y+topoHeight/2
		x2, y2 := x(to.col), to.y+topoHeight/2
		mid := (x1 + x2) / 2
		fmt.Fprintf(&b, `<path class="edge %s" d="M%.1f %.1fC%.1f %.1f %.1f %.1f %.1f %.1f"/>`, t.edges[k], x1, y1, mid, y1, mid, y2, x2, y2)
	}
	esc := template.HTMLEscapeString
	for _, col := range t.cols {
		for _, n := range col {
			label := n.name
			if n.state.Word != "" {
				label += ", " + n.state.Word
			}
			fmt.Fprintf(&b, `<a href="%s" aria-label="%s"><rect class="box" x="%.1f" y="%.1f" width="%d" height="%d" rx="8"/>`, esc(n.url), esc(label), x(n.col)+.5, n.y, topoBox-1, topoHeight)
			tx := x(n.col) + 13
			if n.state.Class != "" {
				fmt.Fprintf(&b, `<circle class="dot %s" cx="%.1f" cy="%.1f" r="5"/>`, n.state.Class, x(n.col)+15, n.y+topoHeight/2)
				tx = x(n.col) + 28
			}
			fmt.Fprintf(&b, `<text x="%.1f" y="%.1f">%s</text></a>`, tx, n.y+topoHeight/2+4.5, esc(clip(n.name, 20)))
		}
	}
	b.WriteString(`</svg>`)
	return template.HTML(b.String()) // what is not a number of ours is escaped above
}
