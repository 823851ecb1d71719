package main

import (
	"bytes"
	"os"
	"reflect"
	"strings"
	"testing"

	"sallyway/platform/api"
)

// TestCurrent holds the generated calls against the document.
func TestCurrent(t *testing.T) {
	doc, err := os.ReadFile("../openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	want, err := Calls(doc, api.GoTypes())
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("../../../internal/platformapi/calls.go")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("calls.go is not current: run go generate ./platform/api ./internal/platformapi")
	}
}

// TestRefusals: what the generator does not understand is an error, and no call that lacks it.
func TestRefusals(t *testing.T) {
	for want, doc := range map[string]string{
		"no Go type":        `{"paths":{"/x":{"get":{"operationId":"x","responses":{"200":{"content":{"application/json":{"schema":{"$ref":"#/components/schemas/Nothing"}}}}}}}}}`,
		"not a type of":     `{"paths":{"/x":{"get":{"operationId":"x","responses":{"200":{"content":{"application/json":{"schema":{"$ref":"#/components/schemas/Foreign"}}}}}}}}}`,
		"not JSON":          `{"paths":{"/x":{"post":{"operationId":"x","requestBody":{"content":{"text/plain":{}}}}}}}`,
		"parameter of type": `{"paths":{"/x":{"get":{"operationId":"x","parameters":[{"name":"q","in":"query","schema":{"type":"array"}}]}}}}`,
	} {
		if _, err := Calls([]byte(doc), map[string]reflect.Type{"Foreign": reflect.TypeFor[testing.T]()}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
