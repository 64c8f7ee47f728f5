"""Day 5, the file system: three replicas, one node killed, nothing lost.

Starts a whole cluster (manager, metadata server, three storage nodes) as real processes in a
temporary folder, and uses it through fsspec.
"""

from __future__ import annotations

import hashlib
import tempfile

from whalefall.fs import KVCache, LocalCluster


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with LocalCluster(folder, nodes=3, replicas=3, lease_s=3.0) as cluster:
            fs = cluster.filesystem()
            data = bytes(range(256)) * 20_000
            fs.pipe("/data/day5.bin", data)
            print("wrote", fs.info("/data/day5.bin")["size"], "bytes, three times over")

            cluster.kill(2)
            same = (
                hashlib.sha256(fs.cat("/data/day5.bin")).digest() == hashlib.sha256(data).digest()
            )
            print("a node is dead, the file reads the same:", same)
            fs.pipe("/data/after.txt", b"written with two replicas")
            fs.mv("/data/after.txt", "/data/moved.txt")
            print("names:", [name.rsplit("/", 1)[1] for name in fs.ls("/data", detail=False)])

            cluster.restart(2)
            cluster.wait_healthy()
            targets = [t for c in cluster.status()["chains"] for t in c["targets"]]
            print("targets that serve again:", sum(t["public"] == "SERVING" for t in targets))

            cache = KVCache(f"{cluster.url}/kv", block_bytes=4096, namespace="demo")
            cache.put_many({f"block {i}": bytes([i]) * 4096 for i in range(8)})
            again = KVCache(f"{cluster.url}/kv", block_bytes=4096, namespace="demo")
            print("cached blocks after a restart of the cache:", len(again))


if __name__ == "__main__":
    main()
