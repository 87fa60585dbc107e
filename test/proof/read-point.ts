import { NbdClient } from '../../core/nbd/index.ts'
import { REGION_BYTES } from './rig.ts'

const PIECE_BYTES = 256 * 1024

/** Reads the stamped region of each export of one point, in the order given. */
export const readRegions = async (socketPath: string, exportNames: readonly string[]): Promise<Buffer[]> =>
  Promise.all(exportNames.map(async (exportName) => {
    await using client = await NbdClient.connect({ path: socketPath }, { exportName })
    const image = Buffer.allocUnsafe(REGION_BYTES)
    for (let at = 0; at < REGION_BYTES; at += PIECE_BYTES) await client.readInto(image, at, at, PIECE_BYTES)
    return image
  }))

/** Socket and export of a URI as the agent gives it. */
export const parsePointUri = (uri: string): { socketPath: string; exportName: string } => {
  const url = new URL(uri)
  return { socketPath: url.searchParams.get('socket') ?? '', exportName: decodeURIComponent(url.pathname.replace(/^\//, '')) }
}
