import type { VmStatus } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import type { CutParticipant } from '../checkpoint/index.ts'

/** What another node says of its members of a group. */
export type MemberReport = { vms: VmStatus[]; lastValid?: { id: string; atUnixMs: number }; abandonedCuts: number }
export type NodeNews = { known: true; report: MemberReport | undefined } | { known: false; why: string }

/** The other nodes of the cluster, as a group needs them. */
export type VpgPeers = {
  /** The name of this node. */
  readonly nodeName: string
  news(node: string, vpg: string): NodeNews
  participant(node: string): CutParticipant
  /** Has the coordinator of the group cut a tagged checkpoint. */
  tag(node: string, vpg: string, tag: string): Promise<{ id: string; atUnixMs: number }>
}

/** The peers of a node that is alone. */
export const noPeers: VpgPeers = {
  nodeName: 'localhost',
  news: (node) => ({ known: false, why: `there is no node ${node}` }),
  participant: (node) => {
    throw new CdpError('INTERNAL', `a node that is alone was to cut with ${node}`)
  },
  tag: async (node) => {
    throw new CdpError('INTERNAL', `a node that is alone was to ask ${node}`)
  },
}

/** Which nodes run members of a group, and which of them cuts. */
export class GroupView {
  readonly nodeOf: ReadonlyMap<number, string>
  /** Sorted. */
  readonly nodes: readonly string[]
  /** Members that are on no node. */
  readonly unplaced: readonly number[]

  constructor(vmIds: readonly number[], nodeOf: ReadonlyMap<number, string>) {
    this.nodeOf = nodeOf
    this.nodes = [...new Set(vmIds.flatMap((vmId) => nodeOf.get(vmId) ?? []))].sort()
    this.unplaced = vmIds.filter((vmId) => !nodeOf.has(vmId))
  }

  /** The node that cuts: every node comes to the same one by itself. Two may think so for a moment after a VM moved; holds see to it that this does no harm. */
  get coordinator(): string | undefined {
    return this.nodes[0]
  }
}
