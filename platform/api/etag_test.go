package api

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
)

// TestSettled says of every field of what has an entity tag whether it is set by somebody. A new field belongs to one of the two, too: what
// changes by itself, and is not taken out in settled, makes If-Match fail for no reason.
func TestSettled(t *testing.T) {
	for _, tc := range []struct {
		v    any
		kept string // fields that the first part of the tag covers
	}{
		{&control.NodeRecord{}, "ID Name Kind State Created Virtual Places Host Port SSHPort TLSPort NextHost NextFrom Peers Person Authentication AWS"},
		{&control.ResourceRecord{}, "Resource FQDN Gateways Names Disabled Created"},
		{&control.PersonRecord{}, "ID Login Name Email Home Role Roles Disabled Password TOTP Providers Created"},
		{&control.Webhook{}, "ID Name URL Events ThroughGateways Created State"},
		{&control.Licence{}, "Installation Entitlement Source Installed"},
		{&control.Organization{}, "Name Range Created Direct Region RelayRegions PlatformDial"},
		{&control.PolicyRecord{}, "ID Name Subject Resource Disabled Created"},
		{&control.GroupRecord{}, "Name Members Created"},
		{&control.ServiceAccountRecord{}, "ID Name Scopes Disabled Created Creator"},
		{&control.ProviderRecord{}, "ID Name Issuer ClientID Redirect Disabled Created ProviderRules"},
		{&control.FlowLog{}, "On"},
	} {
		full := reflect.ValueOf(tc.v).Elem()
		for i := range full.NumField() {
			fillAny(full.Field(i))
		}
		left := reflect.Indirect(reflect.ValueOf(settled(tc.v)))
		var kept []string
		for i := range left.NumField() {
			if !left.Field(i).IsZero() {
				kept = append(kept, left.Type().Field(i).Name)
			}
		}
		// The one state that somebody sets.
		if f := full.FieldByName("State"); f.IsValid() && strings.Contains(tc.kept, "State") {
			f.SetString(string(control.StateDisabled))
			if reflect.Indirect(reflect.ValueOf(settled(tc.v))).FieldByName("State").IsZero() {
				t.Errorf("%T: it was disabled, and its tag does not say so", tc.v)
			}
			kept = append(kept, "State")
		}
		want := strings.Fields(tc.kept)
		slices.Sort(kept)
		slices.Sort(want)
		if !slices.Equal(kept, want) {
			t.Errorf("%T: the tag covers %v, want %v", tc.v, kept, want)
		}
	}
}

// fillAny makes a value one that is not zero.
func fillAny(v reflect.Value) {
	switch v.Kind() {
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64, reflect.Int32:
		v.SetInt(1)
	case reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uint8:
		v.SetUint(1)
	case reflect.Float64:
		v.SetFloat(1)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
	case reflect.Array:
		fillAny(v.Index(0))
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Unix(1, 0)))
			return
		}
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				fillAny(v.Field(i))
			}
		}
	default:
		panic("no value of " + v.Kind().String())
	}
}

// TestTag: what changes by itself changes the second part of a tag alone.
func TestTag(t *testing.T) {
	seen := time.Unix(5, 0)
	a, b, c := &control.NodeRecord{Name: "a", State: control.StateHealthy}, &control.NodeRecord{Name: "a", State: control.StateDegraded, LastSeen: &seen}, &control.NodeRecord{Name: "a", Port: 1}
	set := func(v any) string { first, _, _ := strings.Cut(tag(v), "."); return first }
	if set(a) != set(b) || tag(a) == tag(b) {
		t.Errorf("%s and %s", tag(a), tag(b))
	}
	if set(a) == set(c) {
		t.Errorf("%s and %s", tag(a), tag(c))
	}
	if made := (&control.CreatedNode{NodeRecord: *a, Token: "secret"}); set(made) != set(a) {
		t.Errorf("the tag of what was made is %s, read it is %s", tag(made), tag(a))
	}
	if got := entityTags(` "a" , W/"b",, *`); !slices.Equal(got, []string{`"a"`, `W/"b"`, "*"}) {
		t.Errorf("%q", got)
	}
}

// TestBudgetForgets: callers that are gone are not kept, and of too many none is.
func TestBudgetForgets(t *testing.T) {
	b := budget{rate: 1}
	now := time.Unix(1000, 0)
	for i := range 3 * budgetCallers / 2 {
		b.take(string(rune(i)), now)
		if len(b.callers) > budgetCallers {
			t.Fatalf("%d callers", len(b.callers))
		}
	}
	for range burstSeconds {
		b.take("busy", now)
	}
	if b.take("busy", now).ok {
		t.Error("past the budget")
	}
	// A clock that goes back gives nothing.
	if b.take("busy", now.Add(-time.Hour)).ok {
		t.Error("the clock went back")
	}
	now = now.Add(burstSeconds * time.Second)
	if a := b.take("other", now); !a.ok || len(b.callers) != 1 {
		t.Errorf("%+v, %d callers", a, len(b.callers))
	}
}
