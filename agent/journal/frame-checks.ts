import { CdpError } from '../../core/errors/index.ts'
import { decodeFramePayload, FLAG_DIRECT, hasJson, hasRange, parseCheckpointMark, parseEpochMark, recordJson, RecordKind } from '../../core/record/index.ts'
import type { CheckpointMark, EpochMark, Frame, FrameHeader, ProofMark, SyncEndMark, SyncMark } from '../../core/record/index.ts'

/** What a record that is no data says, with its place in the stream. */
export type JournalMark = { seq: number; epoch: number; atUnixMs: number } & (
  | { is: 'checkpoint'; namedSeq: number; mark: CheckpointMark }
  | { is: 'epoch'; mark: EpochMark }
  | { is: 'proof'; upToSeq: number; mark: ProofMark }
  | { is: 'syncBegin'; mark: SyncMark }
  | { is: 'syncEnd'; mark: SyncEndMark }
  | { is: 'resize'; disk: number; sizeBytes: number }
  | { is: 'joined'; disk: number }
)

/** What changes the disks of the VM from its record on. */
export type DiskMark = Extract<JournalMark, { is: 'resize' | 'joined' }>
export const isDiskMark = (mark: JournalMark): mark is DiskMark => mark.is === 'resize' || mark.is === 'joined'

/** Size of each disk by its number, as the stream has it so far. */
export type DiskSizes = Map<number, number>

const isSyncKind = (kind: unknown): boolean => kind === 'initial' || kind === 'bitmap' || kind === 'full' || kind === 'delta'
const isObject = (value: unknown): value is Record<string, unknown> => typeof value === 'object' && value !== null && !Array.isArray(value)

const isOptional = (value: unknown, type: 'string' | 'number'): boolean => value === undefined || typeof value === type
const syncMark = (json: unknown): SyncMark => {
  if (!isObject(json) || !isSyncKind(json.kind) || !isOptional(json.before, 'string')) throw new CdpError('FORMAT', 'sync record with unexpected JSON')
  return json as SyncMark
}
const syncEndMark = (json: unknown): SyncEndMark => {
  if (!isObject(json) || !isSyncKind(json.kind) || !isOptional(json.sentBytes, 'number')) throw new CdpError('FORMAT', 'sync record with unexpected JSON')
  return json as SyncEndMark
}
const proofMark = (json: unknown): ProofMark => {
  if (!isObject(json) || typeof json.ok !== 'boolean' || !isOptional(json.fromSeq, 'number')) throw new CdpError('FORMAT', 'proof record with unexpected JSON')
  return json as ProofMark
}

const isMark = (kind: number): boolean => kind === RecordKind.resize || kind === RecordKind.joined || hasJson(kind)

const markOf = (frame: Frame, index: number, payload: Buffer): JournalMark => {
  const { header, table } = frame
  const place = { seq: header.firstSeq + index, epoch: header.epoch, atUnixMs: header.atUnixMs }
  const kind = table.kind(index)
  const offset = table.offsetBytes(index)
  if (kind === RecordKind.resize) return { ...place, is: 'resize', disk: table.disk(index), sizeBytes: offset }
  if (kind === RecordKind.joined) return { ...place, is: 'joined', disk: table.disk(index) }
  const json = recordJson(table, index, payload)
  if (kind === RecordKind.checkpoint) return { ...place, is: 'checkpoint', namedSeq: offset, mark: parseCheckpointMark(json) }
  if (kind === RecordKind.epoch) return { ...place, is: 'epoch', mark: parseEpochMark(json) }
  if (kind === RecordKind.proof) return { ...place, is: 'proof', upToSeq: offset, mark: proofMark(json) }
  if (kind === RecordKind.syncBegin) return { ...place, is: 'syncBegin', mark: syncMark(json) }
  return { ...place, is: 'syncEnd', mark: syncEndMark(json) }
}

/**
 * The marks of a checked frame, in order; undefined if it has none. Only a frame with marks is decompressed.
 * @throws CdpError FORMAT if a mark's JSON is not what it should be
 */
export const marksOf = (frame: Frame): JournalMark[] | undefined => {
  const { header, table } = frame
  let marks: JournalMark[] | undefined
  let payload: Buffer | undefined
  for (let index = 0; index < table.count; index++) {
    if (!isMark(table.kind(index))) continue
    payload ??= decodeFramePayload(header, frame.stored)
    marks ??= []
    marks.push(markOf(frame, index, payload))
  }
  return marks
}

const outside = (header: FrameHeader, index: number, message: string, disk: number): CdpError =>
  new CdpError('STREAM_PROTOCOL', message, { context: { seq: header.firstSeq + index, disk } })

/**
 * Checks every record of a frame against the disks of the VM and applies its resizes to `sizes`.
 * @throws CdpError STREAM_PROTOCOL if a record names an unknown disk or lies outside its disk, or a disk shrinks
 */
export const checkRecords = (frame: Frame, sizes: DiskSizes): void => {
  const { header, table } = frame
  for (let index = 0; index < table.count; index++) {
    const kind = table.kind(index)
    const aboutDisk = hasRange(kind) || kind === RecordKind.resize || kind === RecordKind.joined || kind === RecordKind.syncProgress
    if (!aboutDisk) continue
    const disk = table.disk(index)
    const sizeBytes = sizes.get(disk)
    if (sizeBytes === undefined) throw outside(header, index, 'record of a disk that the VM does not have', disk)
    const offset = table.offsetBytes(index)
    if (kind === RecordKind.resize) {
      if (offset < sizeBytes || offset % 512 !== 0) throw outside(header, index, 'resize that shrinks a disk or is not made of sectors', disk)
      sizes.set(disk, offset)
    } else if (kind === RecordKind.syncProgress ? offset > sizeBytes : offset + table.lengthBytes(index) > sizeBytes) {
      throw outside(header, index, 'record outside its disk', disk)
    }
  }
}

export const isDirect = (header: FrameHeader): boolean => (header.flags & FLAG_DIRECT) !== 0
