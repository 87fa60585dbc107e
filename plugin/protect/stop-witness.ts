import { errorMessage } from '../../core/errors/index.ts'
import { readBootId } from '../../core/files/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import type { CaptureWorker } from '../capture/index.ts'
import type { QemuDisk } from '../qemu/index.ts'
import { judgeStop } from './clean-stop.ts'
import type { StartFacts, StopFacts, StopNote } from './clean-stop.ts'
import { proveFile } from './file-proof.ts'
import type { FileProof, NoProof } from './file-proof.ts'
import { StopNoteFile } from './stop-note-file.ts'
import { readCommandLine } from './vm-files.ts'
import type { RunningVm } from './vm-files.ts'
import type { VmMemory } from './vm-memory.ts'

type Goodbye = NonNullable<StopFacts['goodbye']> & { disks: readonly DiskEntry[]; images: StopFacts['images']; last?: StopFacts['last']; files?: StopFacts['files'] }
/** What is known of a start before capture is attached. */
export type StartLook = { note: StopNote | undefined } & Pick<StartFacts, 'bootId' | 'commandLine' | 'files'>

const imagesOf = (disks: readonly QemuDisk[]): StopFacts['images'] => Object.fromEntries(disks.map(({ key, image }) => [key, image]))

const filesOf = async (images: StopFacts['images']): Promise<Record<string, FileProof | NoProof>> =>
  Object.fromEntries(await Promise.all(Object.entries(images).flatMap(([key, image]) => (image === undefined ? [] : [proveFile(image.path).then((proof) => [key, proof] as const)]))))

/** Sees how a VM stops, keeps a note of it, and looks at what its next start finds. What it means is decided by clean-stop.ts. */
export class StopWitness {
  readonly #file: StopNoteFile
  readonly #log: Logger
  #goodbye: Goodbye | undefined

  constructor(options: { stateDirectory: string; vmId: number; log: Logger }) {
    this.#file = new StopNoteFile(options.stateDirectory, options.vmId)
    this.#log = options.log
  }

  /** QEMU ended the capture of every disk in an orderly way, while all was in step. `unproved`: see StopFacts. */
  goodbye(atUnixMs: number, unproved: string | undefined, disks: readonly QemuDisk[], entries: readonly DiskEntry[]): void {
    this.#goodbye = { atUnixMs, unproved, disks: entries, images: imagesOf(disks) }
  }

  /** Capture has been let go: nothing more is recorded. */
  async streamEnded(worker: Pick<CaptureWorker, 'ask'> | undefined): Promise<void> {
    const goodbye = this.#goodbye
    if (goodbye === undefined || worker === undefined) return
    goodbye.last = await worker.ask('lastCaptured', {}).catch(() => undefined)
  }

  /** That QEMU still answers: its goodbye was not the end of the VM. */
  wentOn(): void {
    this.#goodbye = undefined
  }

  /** No QEMU of the VM is there: the moment to look at its files. */
  async gone(): Promise<void> {
    const goodbye = this.#goodbye
    if (goodbye !== undefined) goodbye.files = await filesOf(goodbye.images)
  }

  /** The QEMU that was there has ended. `why`: what was known of capture last. A note that cannot be written costs a sync. */
  async stopped(why: string): Promise<void> {
    const goodbye = this.#goodbye
    this.#goodbye = undefined
    const note = judgeStop({ bootId: await readBootId(), why, goodbye, last: goodbye?.last, disks: goodbye?.disks ?? [], images: goodbye?.images ?? {}, files: goodbye?.files })
    this.#log.info('the VM stopped', 'clean' in note ? { lastSeq: note.clean.lastSeq } : { nextStartSyncs: note.whyNot })
    await this.#file.write(note).catch((error: unknown) => this.#log.warn('how the VM stopped could not be kept: its next start ends in a sync', { error: errorMessage(error) }))
  }

  /** Before capture is attached. Undefined if it was in this QEMU before: what is remembered of that counts. */
  async lookBefore(vm: RunningVm, disks: readonly QemuDisk[], memory: VmMemory | undefined): Promise<StartLook | undefined> {
    if (memory !== undefined && memory.bitmaps !== 'attaching') return undefined
    const note = await this.#file.read()
    if (memory !== undefined && note === undefined) return undefined
    const [bootId, commandLine, files] = await Promise.all([readBootId(), readCommandLine(vm), filesOf(imagesOf(disks))])
    return { note, bootId, commandLine, files }
  }

  /** The VM is captured again: what is known of its last stop has served. */
  async forget(): Promise<void> {
    await this.#file.forget().catch((error: unknown) => this.#log.warn('the note of a stop could not be removed; it proves nothing any more', { error: errorMessage(error) }))
  }
}
