package main

import (
	"regexp"
	"strings"
	"testing"
)

const (
	passing = `{"Action":"start","Package":"p"}
{"Action":"output","Package":"p","Output":"-test.shuffle 12\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"chatter\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}
{"Action":"pass","Package":"p"}
`
	skipping = `{"Action":"output","Package":"p","Test":"TestS","Output":"    a_test.go:1: needs a moon\n"}
{"Action":"output","Package":"p","Test":"TestS","Output":"--- SKIP: TestS (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestS"}
`
	failing = `{"Action":"output","Package":"q","Output":"-test.shuffle 34\n"}
{"Action":"output","Package":"q","Test":"TestF","Output":"    f_test.go:1: wrong\n"}
{"Action":"fail","Package":"q","Test":"TestF"}
{"Action":"output","Package":"q","Output":"FAIL\tq\t0.1s\n"}
{"Action":"fail","Package":"q"}
`
	unbuilt = `{"ImportPath":"q","Action":"build-output","Output":"q.go:1: syntax error\n"}
{"ImportPath":"q","Action":"build-fail"}
{"Action":"output","Package":"q","Output":"FAIL\tq [build failed]\n"}
{"Action":"fail","Package":"q","FailedBuild":"q"}
`
)

func TestReport(t *testing.T) {
	for _, tc := range []struct {
		name, in  string
		ci        bool
		allow     string
		ok        bool
		want, not string
	}{
		{name: "passes", in: passing, ok: true, want: "ok  \tp\t0.1s\n", not: "chatter"},
		{name: "passes without its seed", in: passing, ok: true, want: "ok", not: "shuffle"},
		{name: "fails", in: passing + failing, want: "f_test.go:1: wrong"},
		{name: "fails with its seed", in: passing + failing, want: "-test.shuffle 34", not: "-test.shuffle 12"},
		{name: "does not build", in: passing + unbuilt, want: "q.go:1: syntax error\n"},
		{name: "skip at home", in: passing + skipping, ok: true, want: "skipped: p.TestS: a_test.go:1: needs a moon"},
		{name: "skip in CI", in: passing + skipping, ci: true, want: "SKIPPED"},
		{name: "allowed skip in CI", in: passing + skipping, ci: true, allow: `^p\.TestS$`, ok: true, want: "skipped: p.TestS"},
		{name: "other skip allowed", in: passing + skipping, ci: true, allow: `^p\.TestT$`, want: "SKIPPED"},
		{name: "nothing", in: "", want: "no package"},
		{name: "no json", in: "go: cannot find main module\n", want: "cannot find main module"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var allowed *regexp.Regexp
			if tc.allow != "" {
				allowed = regexp.MustCompile(tc.allow)
			}
			var out strings.Builder
			ok, err := report(strings.NewReader(tc.in), &out, tc.ci, allowed)
			if err != nil || ok != tc.ok || !strings.Contains(out.String(), tc.want) || (tc.not != "" && strings.Contains(out.String(), tc.not)) {
				t.Fatalf("ok %v, err %v, output %q; want ok %v and %q", ok, err, out.String(), tc.ok, tc.want)
			}
		})
	}
}
