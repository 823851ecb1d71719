// Command testreport reads `go test -json` from standard input and prints what a person reads: the summary line of each
// package, the output of tests that failed, and the tests that were skipped. Where the environment says CI=true it
// exits with 1 if a test was skipped that the -allow-skip flag does not name: a skip must not pass for a success.
//
//	go test -json ./... | testreport [-allow-skip REGEXP]
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
)

// event is one line of `go test -json` (go doc test2json).
type event struct {
	Action     string
	Package    string
	ImportPath string // of build-output
	Test       string
	Output     string
}

// maxLine bounds one line of input: an output event of a test that prints a lot without line breaks.
const maxLine = 64 << 20

func main() {
	allow := flag.String("allow-skip", "", "regular expression of tests (package.Test) that may be skipped in CI")
	flag.Parse()
	var allowed *regexp.Regexp
	if *allow != "" {
		var err error
		if allowed, err = regexp.Compile(*allow); err != nil {
			fmt.Fprintln(os.Stderr, "testreport: -allow-skip:", err)
			os.Exit(2)
		}
	}
	ok, err := report(os.Stdin, os.Stdout, os.Getenv("CI") == "true", allowed)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
		os.Exit(2)
	}
	if !ok {
		os.Exit(1)
	}
}

// report writes the readable form of r to w. It says no where a test or a build failed, where nothing was run, or
// where a skip is not allowed.
func report(r io.Reader, w io.Writer, ci bool, allowed *regexp.Regexp) (bool, error) {
	output := make(map[string][]string) // package.Test → what it printed
	var skips []string
	ok, packages := true, 0
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil || e.Action == "" {
			fmt.Fprintln(w, lines.Text()) // what go prints before it begins: bad flags, missing modules
			continue
		}
		name := e.Package + "." + e.Test
		switch {
		case e.Action == "output" && e.Test != "":
			output[name] = append(output[name], e.Output)
		case e.Action == "output" && strings.HasPrefix(e.Output, "-test.shuffle "):
			output[name] = append(output[name], e.Output) // the seed, which only a failure needs
		case e.Action == "output" && e.Output != "PASS\n" && !strings.HasPrefix(e.Output, "=== "):
			fmt.Fprint(w, e.Output)
		case e.Action == "build-output":
			fmt.Fprint(w, e.Output)
		case e.Action == "fail" || e.Action == "build-fail":
			ok = false
			for _, s := range output[name] {
				fmt.Fprint(w, s)
			}
			delete(output, name)
		case e.Action == "skip" && e.Test != "":
			skips = append(skips, name+reason(output[name]))
			delete(output, name)
		case e.Action == "pass":
			delete(output, name)
		}
		if e.Test == "" && (e.Action == "pass" || e.Action == "fail" || e.Action == "skip") {
			packages++
		}
	}
	if err := lines.Err(); err != nil {
		return false, err
	}
	for name, left := range output { // a test that never ended: a panic or a timeout in its package
		if !ok {
			fmt.Fprintf(w, "did not end: %s\n%s", name, strings.Join(left, ""))
		}
	}
	slices.Sort(skips)
	for _, s := range skips {
		name, _, _ := strings.Cut(s, ":")
		switch {
		case !ci || (allowed != nil && allowed.MatchString(name)):
			fmt.Fprintln(w, "skipped:", s)
		default:
			ok = false
			fmt.Fprintln(w, "SKIPPED, which CI counts as a failure:", s)
		}
	}
	if packages == 0 {
		fmt.Fprintln(w, "no package was tested")
		ok = false
	}
	return ok, nil
}

// reason finds what a test said when it was skipped.
func reason(output []string) string {
	for _, s := range slices.Backward(output) {
		if s = strings.TrimSpace(s); s != "" && !strings.HasPrefix(s, "---") && !strings.HasPrefix(s, "===") {
			return ": " + s
		}
	}
	return ""
}
