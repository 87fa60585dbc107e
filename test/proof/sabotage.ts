import { readdirSync } from 'node:fs'
import { checkCut, describeViolation, knows, type CutReport } from '../../agent/proof/index.ts'
import { PointServer } from '../../agent/recovery/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import { JournalCopy, type JournaledWrite } from './journal-copy.ts'
import { readRegions } from './read-point.ts'
import type { ProofRemains } from './run-proof.ts'

export type SabotageResult = {
  /** What the checker found in the untouched copy: 0. */
  control: number
  violations: number
  swapped: string
}

/**
 * Proves that the proof can fail: in a copy of the journals two records are swapped of which the second depended on the first, one before and one
 * behind the cut of a checkpoint. Checksums, digests, sequences and markers are all right; the journal's own scrub finds nothing. Only the order is wrong.
 */
export const sabotage = async ({ rig, history, inspector }: ProofRemains, say: (line: string) => void): Promise<SabotageResult> => {
  const vmsDirectory = `${rig.rootDir}/agent/vms`
  const [site] = readdirSync(vmsDirectory)
  const copies = await Promise.all(rig.vmIds.map((vmId) => JournalCopy.make(String(vmId), `${vmsDirectory}/${site}/${vmId}`, `${rig.rootDir}/copy/${vmId}`)))
  const check = async (checkpointId: string): Promise<CutReport> => {
    await using server = await PointServer.listen({ socketPath: `${rig.rootDir}/copy.sock` })
    const vms = copies.map(({ vm, directory, namedSeqs }) => ({ vm, vmDirectory: directory, seq: namedSeqs.get(checkpointId) ?? 0 }))
    const opened = await server.openPoint({ pointId: 'copy', vms })
    const names = rig.disks.map(({ vmId, key }) => opened.disks.find((disk) => disk.vm === String(vmId) && disk.key === key)?.exportName ?? '')
    return checkCut(history, await readRegions(`${rig.rootDir}/copy.sock`, names))
  }

  const chosen = choose(copies, inspector.inspected.map(({ id }) => id), history.runId)
  const { checkpointId, copy, first, second } = chosen
  const control = (await check(checkpointId)).violationCount
  say(`sabotage: the copy is in order at checkpoint ${checkpointId} (${control} violations)`)
  const swapped = `records ${first.seq} and ${second.seq} of VM ${copy.vm}, writes ${first.stamp.writer}/${first.stamp.sequence} and ${second.stamp.writer}/${second.stamp.sequence}`
  const damage = await copy.swap(first.seq, second.seq)
  if (damage.length > 0) throw new CdpError('INTERNAL', `the sabotaged journal is damaged, not only out of order: ${damage[0]}`)
  say(`sabotage: swapped ${swapped}; the journal's own scrub finds nothing`)
  const report = await check(checkpointId)
  for (const violation of report.violations.slice(0, 5)) say(`found: ${describeViolation(violation)}`)
  return { control, violations: report.violationCount, swapped }
}

/** Two writes around the cut of some checkpoint, the second dependent on the first, neither overwritten before the cut. */
const choose = (copies: readonly JournalCopy[], checkpointIds: readonly string[], runId: number): { checkpointId: string; copy: JournalCopy; first: JournaledWrite; second: JournaledWrite } => {
  for (const copy of copies) {
    const writes = copy.writes(runId)
    for (const checkpointId of checkpointIds) {
      const namedSeq = copy.namedSeqs.get(checkpointId)
      if (namedSeq === undefined || copies.some(({ namedSeqs }) => !namedSeqs.has(checkpointId))) continue
      const cut = writes.findIndex(({ seq }) => seq > namedSeq)
      if (cut < 1) continue
      for (const second of writes.slice(cut, cut + 200)) {
        for (let at = cut - 1; at >= Math.max(0, cut - 200); at--) {
          const first = writes[at]
          const between = writes.slice(at + 1, cut)
          if (!knows(second.stamp.knowledge, first.stamp.writer, first.stamp.sequence) || overlap(first, second)) continue
          if (between.some((write) => overlap(write, first) || overlap(write, second))) continue
          return { checkpointId, copy, first, second }
        }
      }
    }
  }
  throw new CdpError('NOT_FOUND', 'no two dependent records lie around any cut', { hint: 'take more checkpoints' })
}

const overlap = (one: JournaledWrite, other: JournaledWrite): boolean =>
  one.disk === other.disk && one.offsetBytes < other.offsetBytes + other.lengthBytes && other.offsetBytes < one.offsetBytes + one.lengthBytes
