// The cluster around this node: one site for all nodes (its id, pairing and small authority lie in the cluster file system), where each VM
// is, and a warm TLS connection (cdp-node/1, docs/decisions/group-cut-over-nodes.md) to every node that runs members of our groups. Over it
// go hold, commit and release of group cuts, tags for a group's coordinator, and the state of members, asked twice a second.
// plugin/main.ts opens it, plugin/api tends it and answers other nodes, plugin/protect sees other nodes as participants of a cut.
// It never decides about a cut, never waits for a node without a deadline, and opens no port while this node is alone.
export { Cluster } from './cluster.ts'
export type { ClusterOptions } from './cluster.ts'
export { ClusterFiles, localNodeName } from './cluster-files.ts'
export type { NodeAddress } from './cluster-files.ts'
export { serveNode } from './node-door.ts'
export { NodeLink } from './node-link.ts'
export type { NodeReport } from './node-link.ts'
export type { NodeHandlers } from './wire.ts'
