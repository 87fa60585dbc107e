import { errorCode } from '../../core/errors/index.ts'
import { FilePool, IndexView, PageCache } from '../index/index.ts'
import { damagedExtents, isInside, isReached } from '../journal/index.ts'
import type { Damage, MirrorDamage, VmStore } from '../journal/index.ts'

const OPEN_FILES = 64
const PAGE_CACHE_BYTES = 4 * 1024 * 1024

/** The first of ascending numbers of which `holds` is true; it stays true once it is. Undefined if it is of none. */
export const firstThat = async (numbers: readonly number[], holds: (value: number) => Promise<boolean>): Promise<number | undefined> => {
  const newest = numbers.at(-1)
  if (newest === undefined || !(await holds(newest))) return undefined
  let low = 0
  let high = numbers.length - 1
  while (low < high) {
    const middle = (low + high) >>> 1
    if (await holds(numbers[middle])) high = middle
    else low = middle + 1
  }
  return numbers[low]
}

/** Something of the range is read from the mirror as of the view, or will be: what the base has already, no promotion writes again. */
const isBaseReached = async (view: IndexView, { disk, offsetBytes, lengthBytes }: MirrorDamage, baseSeq: number): Promise<boolean> =>
  (await view.resolve(disk, offsetBytes, lengthBytes)).some(({ from, segment }) => from === 'base' || from === 'promoted' || view.segment(segment).firstSeq <= baseSeq)

/**
 * Which states need what is damaged. A state needs a damaged frame if the index as of it leads there, and a part of the mirror if the index leads to nothing in the
 * journal: exactly what a reader would meet. Later states need ever less of it, since records only cover more.
 */
export class Judge implements AsyncDisposable {
  readonly #store: VmStore
  readonly #files = new FilePool(OPEN_FILES)
  readonly #cache = new PageCache(PAGE_CACHE_BYTES)

  constructor(store: VmStore) {
    this.#store = store
  }

  /** What a damaged stretch of a segment was about; undefined if nobody knows: the segment was never sealed, or the damage is not inside one. */
  async extentsOf(damage: Damage): Promise<Awaited<ReturnType<typeof damagedExtents>>> {
    const info = this.#store.segments.find(({ segmentNumber }) => segmentNumber === damage.segment)
    if (info === undefined || !isInside(info, damage)) return undefined
    try {
      return await damagedExtents(this.#files, info.path, damage)
    } catch (error) {
      if (['CHECKSUM', 'FORMAT', 'ENOENT'].includes(errorCode(error) ?? '')) return undefined
      throw error
    }
  }

  /** The first of these checkpoints (ascending) that does not need what is damaged; undefined if all do, or nobody knows. */
  async healedFrom(damage: Damage, namedSeqs: readonly number[]): Promise<number | undefined> {
    const extents = await this.extentsOf(damage)
    const info = this.#store.segments.find(({ segmentNumber }) => segmentNumber === damage.segment)
    if (extents === undefined || info === undefined) return undefined
    // A state that cuts the segment reads all of its frames up to the cut.
    return firstThat(namedSeqs.filter((seq) => seq > info.lastSeq), (seq) => this.#isFree(seq, (view) => isReached(view, damage, extents)))
  }

  mirrorHealedFrom(damage: MirrorDamage, namedSeqs: readonly number[]): Promise<number | undefined> {
    return firstThat(namedSeqs, (seq) => this.#isFree(seq, (view) => isBaseReached(view, damage, this.#store.baseSeq)))
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#files[Symbol.asyncDispose]()
  }

  async #isFree(seq: number, reaches: (view: IndexView) => Promise<boolean>): Promise<boolean> {
    try {
      return !(await reaches(await IndexView.open({ vmDirectory: this.#store.directory, seq, files: this.#files, cache: this.#cache })))
    } catch (error) {
      // A state that cannot even be looked up is no help to anybody.
      if (errorCode(error) === 'JOURNAL_DAMAGED' || errorCode(error) === 'NOT_FOUND') return false
      throw error
    }
  }
}
