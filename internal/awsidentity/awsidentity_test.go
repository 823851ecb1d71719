package awsidentity

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestVectors holds the signature against AWS's published test suite for Signature Version 4.
func TestVectors(t *testing.T) {
	c := &Credentials{accessKey: "AKIDEXAMPLE", secret: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"}
	for _, tc := range []struct {
		name, method, query string
		headers             map[string]string
		body, want          string
	}{
		{"get-vanilla", "GET", "", nil, "", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"},
		{"post-vanilla", "POST", "", nil, "", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"},
		{
			"post-x-www-form-urlencoded", "POST", "",
			map[string]string{"content-type": "application/x-www-form-urlencoded"},
			"Param1=value1",
			"ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a",
		},
	} {
		r := request{method: tc.method, host: "example.amazonaws.com", path: "/", query: tc.query, region: "us-east-1", service: "service", headers: map[string]string{"x-amz-date": "20150830T123600Z"}, body: tc.body}
		for k, v := range tc.headers {
			r.headers[k] = v
		}
		if got := r.authorization(c); !strings.HasSuffix(got, "Signature="+tc.want) {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
	}
}

func TestFind(t *testing.T) {
	metadata := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := map[string]string{
			"PUT /latest/api/token":                                "session",
			"GET /latest/meta-data/iam/security-credentials/":      "relay\n",
			"GET /latest/meta-data/iam/security-credentials/relay": `{"Code":"Success","AccessKeyId":"AKIDINSTANCE","SecretAccessKey":"s3","Token":"t3"}`,
			"GET /task": `{"AccessKeyId":"AKIDTASK","SecretAccessKey":"s4","Token":"t4"}`,
		}[r.Method+" "+r.URL.Path]
		v2 := r.Method == "PUT" || r.Header.Get("X-Aws-Ec2-Metadata-Token") == "session"
		if answer == "" || (strings.HasPrefix(r.URL.Path, "/latest/") && !v2) || (r.URL.Path == "/task" && r.Header.Get("Authorization") != "pod") {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = w.Write([]byte(answer))
	}))
	defer metadata.Close()
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	shared := write("credentials", "[default]\naws_access_key_id = AKIDDEFAULT\naws_secret_access_key=s1\n\n[ops]\n# x\naws_access_key_id=AKIDOPS\naws_secret_access_key=s2\naws_session_token=t2\n")
	config := write("config", "[profile ops]\nregion = eu-west-1\n")
	for _, tc := range []struct {
		name string
		env  map[string]string
		key  string // access key, or what the error says
	}{
		{"environment", map[string]string{"AWS_ACCESS_KEY_ID": "AKIDENV", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SHARED_CREDENTIALS_FILE": shared}, "AKIDENV"},
		{"half an environment", map[string]string{"AWS_ACCESS_KEY_ID": "AKIDENV"}, "is missing"},
		{"a line break in a key", map[string]string{"AWS_ACCESS_KEY_ID": "AKIDENV", "AWS_SECRET_ACCESS_KEY": "a\nb"}, "characters"},
		{"default profile", map[string]string{"AWS_SHARED_CREDENTIALS_FILE": shared, "AWS_CONFIG_FILE": config}, "AKIDDEFAULT"},
		{"named profile", map[string]string{"AWS_PROFILE": "ops", "AWS_SHARED_CREDENTIALS_FILE": shared, "AWS_CONFIG_FILE": config}, "AKIDOPS"},
		{"unknown profile", map[string]string{"AWS_PROFILE": "nobody", "AWS_SHARED_CREDENTIALS_FILE": shared}, "do not have it"},
		{"web identity without a role", map[string]string{"AWS_WEB_IDENTITY_TOKEN_FILE": "x"}, "without AWS_ROLE_ARN"},
		{"container", map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": metadata.URL + "/task", "AWS_CONTAINER_AUTHORIZATION_TOKEN": "pod"}, "AKIDTASK"},
		{"container without its token", map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": metadata.URL + "/task"}, "status 401"},
		{"container elsewhere", map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://192.0.2.1/task"}, "plain HTTP"},
		{"instance", map[string]string{"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.URL}, "AKIDINSTANCE"},
		{"none", map[string]string{"AWS_EC2_METADATA_DISABLED": "true"}, "no AWS credentials"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := Find(t.Context(), Config{Getenv: func(k string) string { return tc.env[k] }})
			if err != nil {
				if !strings.Contains(err.Error(), tc.key) || strings.Contains(err.Error(), "s2") {
					t.Errorf("%v, want %q", err, tc.key)
				}
				return
			}
			if c.accessKey != tc.key {
				t.Errorf("%s from %v", c.accessKey, c)
			}
		})
	}
}
