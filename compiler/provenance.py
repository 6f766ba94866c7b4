"""What a bundle is made of, in the words of two standards: a CycloneDX 1.6 ML-BOM and SLSA v1 provenance, both written from the manifest.

A bill of materials is a claim. Each property says which kind: `verified` was compared with bytes (digests and sizes of what was read or written), `declared`
is what a file or a person said (names, tasks, the base an adapter names). Neither document has a time or a serial number of its own: equal bundles give
equal documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtimes.bundle import MANIFEST, read_json_object, verify_bundle

BUILD_TYPE = "trimtab:compile:v1"
PREDICATE = "https://slsa.dev/provenance/v1"
STATEMENT = "https://in-toto.io/Statement/v1"


def describe_bundle(bundle: Path) -> dict[str, Any]:
    """{"bom": ..., "provenance": ...} of a bundle, after every byte of it was compared with its manifest. Raises BundleError."""
    verify_bundle(bundle)
    manifest = read_json_object(bundle / MANIFEST)
    return {"bom": bom(manifest), "provenance": provenance(manifest)}


def bom(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """CycloneDX 1.6, of one machine-learning-model, what it was made from, and the tools that made it."""
    model, lineage = manifest["model"], manifest["lineage"]
    files = [{"type": "file", "name": row["path"], "hashes": _sha256(row["sha256"]), "properties": [_kind("verified")]} for row in manifest["files"]]
    sources = [_source(lineage["base"], "base"), *(_source(row, f"delta, {row['kind']}, weight {row['weight']}") for row in lineage["deltas"])]
    tools = [{"type": "library", "name": name, "version": version} for name, version in sorted(lineage["tools"].items())]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": tools},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": manifest["digest"],
                "name": manifest["name"],
                "hashes": _sha256(manifest["digest"]),
                "modelCard": {"modelParameters": {"task": str(model.get("task", "")), "architectureFamily": str(model.get("family", ""))}},
                "properties": [_kind("verified", "digest"), _kind("declared", "task"), _kind("declared", "family"), _kind("verified", "parameters")],
                "components": files,
            },
        },
        "components": sources,
        "dependencies": [{"ref": manifest["digest"], "dependsOn": list(dict.fromkeys(source["bom-ref"] for source in sources))}],
    }


def _source(row: Mapping[str, Any], role: str) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": f"{role}:{row['digest']}",
        "name": str(row["origin"]),
        "description": role,
        "hashes": _sha256(row["digest"]),
        "properties": [_kind("verified", "hashes"), _kind("declared", "name")],
    }


def provenance(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """An in-toto statement with an SLSA v1 predicate: the files, what they were built from, and how."""
    lineage = manifest["lineage"]
    sources = [{"name": row["origin"], "digest": {"sha256": row["digest"]}} for row in (lineage["base"], *lineage["deltas"])]
    return {
        "_type": STATEMENT,
        "subject": [{"name": row["path"], "digest": {"sha256": row["sha256"]}} for row in manifest["files"]],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": lineage["recipe"], "target": manifest["target"], "limits": manifest["limits"]},
                "internalParameters": {record["stage"]: record["key"] for record in manifest["records"] if record["key"]},
                "resolvedDependencies": sources,
            },
            "runDetails": {"builder": {"id": BUILD_TYPE, "version": lineage["tools"]}, "metadata": {"invocationId": manifest["digest"]}},
        },
    }


def _sha256(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _kind(kind: str, field: str = "hashes") -> dict[str, str]:
    return {"name": f"trimtab:{field}", "value": kind}
