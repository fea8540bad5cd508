"""`--to systemd`: a unit for `qtool serve` on this machine, with a watchdog and limits.

The server tells systemd when it is ready and, while its engine is healthy, that it is alive
(`runtime/server/supervisor.py`): a start that fails and an engine that hangs are both seen.
Sources: systemd.service(5), systemd.exec(5), systemd.resource-control(5).
"""

from __future__ import annotations

from pathlib import Path

from qtool.errors import UsageError
from qtool.runtime.deploy.deployment import Deployment
from qtool.runtime.deploy.files import SECRET, File
from qtool.runtime.deploy.grafana import dashboard
from qtool.runtime.deploy.prometheus import alert_rules, scrape_config, static_targets, to_yaml

WATCHDOG_SECONDS = 60
START_SECONDS = 1800

UNIT = """\
# /etc/systemd/system/{name}.service
[Unit]
Description=qtool serves {description}
Documentation=https://github.com/qtool/qtool
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=10min
StartLimitBurst=5

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
{user}
Environment=PYTHONSAFEPATH=1
Environment=HF_HOME=%C/{name}/huggingface
Environment=XDG_CACHE_HOME=%C/{name}
EnvironmentFile=-/etc/qtool/{name}.env
{credential}CacheDirectory={name}
Restart=on-failure
RestartSec=5
TimeoutStartSec={start_seconds}
TimeoutStopSec={stop_seconds:g}
WatchdogSec={watchdog_seconds}
CPUQuota={cpu_percent}%
MemoryMax={memory_bytes}
LimitNOFILE=65536
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictSUIDSGID=yes
LockPersonality=yes

[Install]
WantedBy=multi-user.target
"""


def systemd_files(deployment: Deployment, *, python: str, user: str) -> dict[str, File]:
    """
    python  the interpreter that qtool is installed for
    user    who runs it; root: a user that systemd makes for the service
    """
    if deployment.scale.replicas > 1 or deployment.scale.most is not None:
        raise UsageError(
            f"--to systemd runs one replica on one machine, not {deployment.scale.replicas}"
            + ("" if deployment.scale.most is None else f" to {deployment.scale.most}"),
            "for several use --to ray or --to k8s",
        )
    keys = deployment.asked.server.api_keys
    arguments = deployment.arguments(
        _model(deployment),
        without=("api_key", "api_key_file"),
        served_model_name=deployment.asked.server.served_model_names,
        **_absolute(deployment),
    )
    words = [quoted(word) for word in (python, "-m", "qtool", "serve", *arguments)]
    credential = ""
    if keys:
        # %d is where systemd puts the credential for this service alone.
        words += ["--api-key-file", "%d/api-keys"]
        credential = f"LoadCredential=api-keys:/etc/qtool/{deployment.name}.keys\n"
    unit = UNIT.format(
        name=deployment.name,
        description=escaped(deployment.facts.name),
        command=" ".join(words),
        user="DynamicUser=yes" if user == "root" else f"User={user}",
        credential=credential,
        start_seconds=START_SECONDS,
        stop_seconds=deployment.asked.server.shutdown_timeout + 10,
        watchdog_seconds=WATCHDOG_SECONDS,
        cpu_percent=100 * deployment.resources.cpus,
        memory_bytes=deployment.resources.memory_bytes,
    )
    host = deployment.asked.options.host
    scraped = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    files = {
        f"{deployment.name}.service": File(unit),
        "prometheus.yml": File(scrape_config(static_targets([f"{scraped}:{deployment.port}"]))),
        "alerts.yml": File(to_yaml(alert_rules())),
        "dashboard.json": File(dashboard(deployment.name)),
    }
    if keys:
        files[f"{deployment.name}.keys"] = File("\n".join(keys) + "\n", SECRET)
    return files


def _model(deployment: Deployment) -> str:
    """A service starts in /: the model's path must be whole."""
    facts = deployment.facts
    is_path = facts.kind in ("folder", "gguf")
    return str(facts.path) if is_path else deployment.asked.engine.model


def _absolute(deployment: Deployment) -> dict[str, object]:
    """Flags that name files, with whole paths."""
    changed: dict[str, object] = {}
    for name in (
        "chat_template", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "speculative_model"
    ):  # fmt: skip
        value = deployment.flags.get(name)
        if value is not None and Path(value).exists():
            changed[name] = str(Path(value).resolve())
    modules = deployment.asked.engine.lora_modules
    if modules:
        changed["lora_modules"] = [
            f"{name}={Path(folder).resolve() if Path(folder).is_dir() else folder}"
            for name, folder in modules
        ]
    return changed


def escaped(text: str) -> str:
    """% begins a specifier in a unit."""
    return text.replace("%", "%%")


def quoted(word: str) -> str:
    """One word of ExecStart: systemd.service(5), "COMMAND LINES"."""
    text = escaped(word).replace("$", "$$")
    if text and not any(character in text for character in " \t\n\"'\\;"):
        return text
    inner = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{inner}"'
