import { leafExtents } from '../index/index.ts'
import type { FilePool, IndexView, LeafExtent } from '../index/index.ts'
import type { Damage } from './segment-info.ts'

export type Stretch = { fromBytes?: number; toBytes?: number }

/** A frame is a part of the damage; where no place is known, every frame of the segment is. */
const holds = ({ fromBytes = 0, toBytes = Infinity }: Stretch, frameOffset: number): boolean => frameOffset >= fromBytes && frameOffset < toBytes

/**
 * The ranges whose newest data, within their segment, are in damaged frames: said by the leaf run, which is checked apart from them. Zeroes are not among
 * them: the run itself says that a range reads as zeroes.
 * @returns undefined if the segment has no run: nobody knows what its frames were about
 * @throws CdpError CHECKSUM, FORMAT; Node's error
 */
export const damagedExtents = (files: FilePool, path: string, damage: Stretch): Promise<LeafExtent[] | undefined> =>
  leafExtents(files, path, (frameOffset) => frameOffset !== undefined && holds(damage, frameOffset))

/** Something of these ranges is read from the damaged frames, as of the view. @throws as IndexView.resolve */
export const isReached = async (view: IndexView, damage: Damage, extents: readonly LeafExtent[]): Promise<boolean> => {
  for (const { disk, offsetBytes, lengthBytes } of extents) {
    const pieces = await view.resolve(disk, offsetBytes, lengthBytes)
    if (pieces.some((piece) => piece.from === 'data' && piece.segment === damage.segment && holds(damage, piece.frameOffset))) return true
  }
  return false
}
