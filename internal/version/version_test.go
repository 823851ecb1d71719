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
