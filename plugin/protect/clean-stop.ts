import type { DiskEntry } from '../../core/record/index.ts'
import type { Welcome } from '../../core/stream/index.ts'
import type { DiskImage } from '../qemu/index.ts'
import { differenceOf } from './file-proof.ts'
import type { FileProof, NoProof } from './file-proof.ts'

// Stop and start without a sync: what has to be known of a VM's stop and of its next start (semantics.md, Sync). Pure; one condition missing is a reason.

/** A VM stopped in step: the agent has everything once it has `lastSeq` of `epoch`, for as long as nobody touches the files (by disk key). */
export type CleanStop = { bootId: string; epoch: number; lastSeq: number; disks: readonly DiskEntry[]; files: Readonly<Record<string, FileProof>> }
/** What the plugin keeps of a VM's last stop. */
export type StopNote = { format: 1 } & ({ clean: CleanStop } | { whyNot: string })

export type StopFacts = {
  bootId: string | undefined
  /** What was last known of capture, for people. */
  why: string
  /** QEMU said goodbye for every disk of capture that was in step. `unproved`: why the last look at its counters is no proof. */
  goodbye: { atUnixMs: number; unproved: string | undefined } | undefined
  /** Of the stream when it had ended; `atUnixMs`: by key, when a disk was written to last. */
  last: { epoch: number; seq: number; atUnixMs: Readonly<Record<string, number>> } | undefined
  disks: readonly DiskEntry[]
  images: Readonly<Record<string, DiskImage | undefined>>
  /** Taken after QEMU had gone and before another one came; undefined if there was no such moment. */
  files: Readonly<Record<string, FileProof | NoProof>> | undefined
}

/** Decides what a stop was. */
export const judgeStop = ({ bootId, why, goodbye, last, disks, images, files }: StopFacts): StopNote => {
  const not = (whyNot: string): StopNote => ({ format: 1, whyNot })
  if (goodbye === undefined) return not(`capture was not in step when the VM stopped (${why})`)
  if (goodbye.unproved !== undefined) return not(`it was not certain that everything was captured when the VM stopped: ${goodbye.unproved}`)
  if (last === undefined) return not('the capture worker ended with the VM')
  if (bootId === undefined) return not('this boot of the node has no name')
  if (files === undefined) return not('the VM was started again before its disks were looked at')
  const proofs: Record<string, FileProof> = {}
  for (const { key } of disks) {
    const image = images[key]
    const file = files[key]
    if (image === undefined || file === undefined) return not(`${key}: only files without a backing file give a proof that nobody else wrote`)
    if ('none' in file) return not(`${key}: ${file.none}`)
    // Writes reach a raw file before they reach us. One of qcow2 is also written to for itself, as long as QEMU holds it.
    const untilUnixMs = image.raw ? Math.min(last.atUnixMs[key] ?? 0, goodbye.atUnixMs) : goodbye.atUnixMs
    if (BigInt(file.ctimeNs) > BigInt(Math.ceil(untilUnixMs) + 1) * 1_000_000n) return not(`${key}: it was written to after the last write that was captured`)
    proofs[key] = file
  }
  return { format: 1, clean: { bootId, epoch: last.epoch, lastSeq: last.seq, disks: [...disks], files: proofs } }
}

export type StartFacts = {
  bootId: string | undefined
  /** QEMU's; undefined if it cannot be read. */
  commandLine: readonly string[] | undefined
  welcome: Pick<Welcome, 'epoch' | 'durableSeq'> & { agentLostData?: boolean }
  disks: readonly DiskEntry[]
  /** Taken after QEMU had started and before capture was attached. */
  files: Readonly<Record<string, FileProof | NoProof>>
  /** Why it is not certain that everything written since QEMU started was captured. */
  missed: string | undefined
}

const bringsItsState = (argument: string): boolean => /^--?(?:incoming|loadstate|loadvm)$/.test(argument)

/** Why a VM that was started needs a sync; undefined if nothing can have been missed. */
export const whySync = (note: StopNote | undefined, facts: StartFacts): string | undefined => {
  const { bootId, commandLine, welcome, disks, files, missed } = facts
  if (commandLine === undefined) return 'how QEMU was started cannot be read'
  if (commandLine.some(bringsItsState)) return 'it was started as the target of a migration or from a saved state'
  if (note === undefined) return 'its last stop was not seen'
  if ('whyNot' in note) return note.whyNot
  const { clean } = note
  if (missed !== undefined) return missed
  if (bootId !== clean.bootId) return 'the node was started again since the VM stopped'
  if (JSON.stringify(disks) !== JSON.stringify(clean.disks)) return 'it has other disks than when it stopped'
  for (const { key } of disks) {
    const now = files[key]
    const changed = now === undefined || 'none' in now ? (now?.none ?? 'its file is not known') : differenceOf(clean.files[key], now)
    if (changed !== undefined) return `disk changed while the VM was off (${key}: ${changed})`
  }
  if (welcome.epoch !== clean.epoch + 1) return 'its stream was taken up by another attach since it stopped'
  if (welcome.agentLostData === true || welcome.durableSeq !== clean.lastSeq) return 'what was captured before it stopped is not all at the recovery site'
  return undefined
}
