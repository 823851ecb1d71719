package main

import (
	"slices"
	"testing"

	"sallyway/bench"
)

// TestConfig: flags change the scenarios that they speak of, and no others.
func TestConfig(t *testing.T) {
	config := func(args ...string) (bench.Config, error) {
		t.Helper()
		var o options
		cmd := o.command()
		if err := cmd.ParseFlags(args); err != nil {
			t.Fatal(err)
		}
		return o.config(cmd)
	}
	quick, err := config("--quick")
	if err != nil || len(quick.Scenarios) == 0 || slices.Contains(quick.Scenarios[0].Beside, bench.Nebula) {
		t.Fatalf("quick: %v, %+v", err, quick)
	}
	one, err := config("--quick", "--peers", "--scenario", bench.OneRelay, "--runs", "2", "--flows", "3", "--mtu", "1400")
	if err != nil || len(one.Scenarios) != 1 || one.MTU != 1400 {
		t.Fatalf("one: %v, %+v", err, one)
	}
	s := one.Scenarios[0]
	if !slices.Contains(s.Beside, bench.Nebula) || s.Load.Runs != 2 || !slices.Equal(s.Load.Flows, []int{3}) || s.Load.Beats != quick.Scenarios[0].Load.Beats {
		t.Errorf("one: %+v", s)
	}
	two, err := config("--peers=false", "--scenario", bench.TwoRelays+","+bench.OneRelay)
	if err != nil || len(two.Scenarios) != 2 || len(two.Scenarios[0].Beside) != 0 || two.Scenarios[1].Load.Moves == 0 {
		t.Errorf("two: %v, %+v", err, two)
	}
	// A quick run knows the others too, with the loads of a full one.
	wide, err := config("--quick", "--scenario", bench.NoOffload)
	if err != nil || len(wide.Scenarios) != 1 || wide.Scenarios[0].Load.Runs == 0 {
		t.Errorf("wide: %v, %+v", err, wide)
	}
	if _, err := config("--scenario", "one-rely"); err == nil {
		t.Error("a scenario that does not exist is taken")
	}
}
