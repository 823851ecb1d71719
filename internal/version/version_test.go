package version

import (
	"runtime/debug"
	"strings"
	"testing"
)

func TestFrom(t *testing.T) {
	vcs := []debug.BuildSetting{{Key: "vcs.revision", Value: "0123456789abcdef0123"}, {Key: "vcs.modified", Value: "true"}}
	for _, tc := range []struct {
		name            string
		version, commit string
		bi              *debug.BuildInfo
		want            [2]string
	}{
		{"linker wins", "v1.2.3", "abc", &debug.BuildInfo{Main: debug.Module{Version: "v9"}, Settings: vcs}, [2]string{"v1.2.3", "abc"}},
		{"tool chain", "", "", &debug.BuildInfo{Main: debug.Module{Version: "v9"}, Settings: vcs}, [2]string{"v9", "0123456789ab-dirty"}},
		{"devel, no vcs", "", "", &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, [2]string{"devel", ""}},
		{"nothing recorded", "", "", nil, [2]string{"devel", ""}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := from(tc.version, tc.commit, tc.bi)
			if got.Version != tc.want[0] || got.Commit != tc.want[1] {
				t.Fatalf("got %q %q, want %q", got.Version, got.Commit, tc.want)
			}
			if s := got.String(); !strings.Contains(s, tc.want[0]) || !strings.Contains(s, got.Go) {
				t.Fatalf("String() = %q lacks version or Go release", s)
			}
		})
	}
}

func TestOutdated(t *testing.T) {
	for _, tc := range []struct {
		v, own string
		want   bool
	}{
		{"v1.2.3", "v1.2.3", false},
		{"v1.2.0", "v1.2.9", false}, // patches go together
		{"v1.2.3-4-g0123abcd", "v1.2.9", false},
		{"v1.1.9", "v1.2.0", true},
		{"v1.10.0", "v1.9.0", false},
		{"v0.9.0", "v1.0.0", true},
		{"v2.0.0", "v1.9.0", false},
		{"", "v1.2.3", true},
		{"devel", "v1.2.3", true},
		{"v1", "v1.2.3", true},
		{"vx.y.z", "v1.2.3", true},
		{"v1.1.0", "devel", false},
		{"", "devel", false},
	} {
		if got := outdated(tc.v, tc.own); got != tc.want {
			t.Errorf("%q at %q: outdated %v", tc.v, tc.own, got)
		}
	}
}
