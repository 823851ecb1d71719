package daemon

import (
	"fmt"
	"strings"
	"text/template"
	"time"
)

// unitTemplate is the systemd unit of a daemon. It runs as a user that exists only while it runs (DynamicUser), sees
// the file system read-only but for its state, and has no capability but those that its role needs. Exit codes 2
// and 3 are not retried: the configuration or the token has to change first.
var unitTemplate = template.Must(template.New("unit").Parse(`[Unit]
Description=Sallyway {{.Spec.Role}}
Wants=network-online.target
After=network-online.target nss-lookup.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={{.ExecStart}}
Restart=on-failure
RestartSec=2
RestartPreventExitStatus=2 3
WatchdogSec=60
TimeoutStartSec=180
TimeoutStopSec={{.StopSeconds}}
KillMode=mixed
LimitNOFILE=1048576
{{- if .Token}}
# Without the file the daemon gets an empty token: one that is enrolled needs none, and another says which command to type.
SetCredential=token:\n
LoadCredential=token:{{.Token}}
{{- end}}

DynamicUser=yes
User={{.Unit}}
StateDirectory=sallyway/{{.State}}
StateDirectoryMode=0700
UMask=0077
CapabilityBoundingSet={{.Capabilities}}
AmbientCapabilities={{.Capabilities}}
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateMounts=yes
{{- if .Devices}}
DevicePolicy=closed
{{- range .Devices}}
DeviceAllow={{.}}
{{- end}}
{{- else}}
PrivateDevices=yes
{{- end}}
ProtectProc=invisible
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
`))

// polkitRule lets the unit's user set up split DNS on its own link in systemd-resolved, which asks polkit about
// everybody but root.
const polkitRule = `polkit.addRule(function(action, subject) {
  if (subject.user == "%[1]s" && action.id.indexOf("org.freedesktop.resolve1.") == 0) {
    return polkit.Result.YES;
  }
});
`

// defaultStopTimeout is systemd's own.
const defaultStopTimeout = 90 * time.Second

// unitName is the unit without ".service", and the name of its user.
func (s Spec) unitName() string { return "sallyway-" + s.Role }

// packageName is the package that holds the daemon: the client is a verb of the command line's.
func (s Spec) packageName() string {
	if s.program() != s.Name {
		return s.program()
	}
	return s.unitName()
}

// execStart returns the value of ExecStart=. Paths are as the installed system sees them; args follow the start command.
func (s Spec) execStart(exe, config string, args []string) (string, error) {
	words := append([]string{exe}, strings.Fields(s.Name)[1:]...) // connect, of `sallyway connect`
	words = append(words, s.Start...)
	words = append(words, "--config", config)
	words = append(words, args...)
	line := make([]string, len(words))
	for i, w := range words {
		if strings.ContainsAny(w, "\n\r\x00") {
			return "", Usagef("argument %q has a line break, which a unit cannot hold", w)
		}
		line[i] = quoteExec(w)
	}
	return strings.Join(line, " "), nil
}

// unit returns the unit's text. Paths are as the installed system sees them; token is not looked at where the daemon
// enrols nowhere; args follow the start command.
func (s Spec) unit(exe, config, token string, args []string) (string, error) {
	line, err := s.execStart(exe, config, args)
	if err != nil {
		return "", err
	}
	if s.NoToken {
		token = ""
	}
	stop := s.StopTimeout
	if stop == 0 {
		stop = defaultStopTimeout
	}
	var b strings.Builder
	err = unitTemplate.Execute(&b, map[string]any{
		"Spec": s, "Unit": s.unitName(), "Token": token, "ExecStart": line,
		"State": s.stateName(), "StopSeconds": int(stop.Seconds()),
		"Capabilities": strings.Join(s.Capabilities, " "), "Devices": s.Devices,
	})
	if err != nil {
		return "", fmt.Errorf("write the unit: %w", err)
	}
	return b.String(), nil
}

// quoteExec quotes one word of ExecStart= (systemd.service(5), "Command lines"): specifiers and variables are escaped.
func quoteExec(w string) string {
	w = strings.NewReplacer(`%`, `%%`, `$`, `$$`).Replace(w)
	if w != "" && !strings.ContainsAny(w, " \t\"'\\;") {
		return w
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(w) + `"`
}
