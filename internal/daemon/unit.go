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
var unitTemplate = template.Must(template.New("unit").Parse(`# Written by "{{.Spec.Name}} install"; "{{.Spec.Name}} uninstall" removes it.
# Settings belong into {{.Config}}; changes of the unit into "systemctl edit {{.Unit}}".
[Unit]
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
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
`))

// polkitRule lets the unit's user set up split DNS on its own link in systemd-resolved, which asks polkit about
// everybody but root.
const polkitRule = `// Written by "%[1]s install"; "%[1]s uninstall" removes it.
polkit.addRule(function(action, subject) {
  if (subject.user == "%[2]s" && action.id.indexOf("org.freedesktop.resolve1.") == 0) {
    return polkit.Result.YES;
  }
});
`

// defaultStopTimeout is systemd's own.
const defaultStopTimeout = 90 * time.Second

// unitName is the unit without ".service", and the name of its user.
func (s Spec) unitName() string { return "sallyway-" + s.Role }

// unit returns the unit's text. exe and the paths are as the installed system sees them; args follow the start command.
func (s Spec) unit(exe, config, token string, args []string) (string, error) {
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
	stop := s.StopTimeout
	if stop == 0 {
		stop = defaultStopTimeout
	}
	var b strings.Builder
	err := unitTemplate.Execute(&b, map[string]any{
		"Spec": s, "Unit": s.unitName(), "Config": config, "Token": token, "ExecStart": strings.Join(line, " "),
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
