import { Type } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'
import { CdpError } from '../../core/errors/index.ts'
import { readJsonFile, writeJsonFile } from '../../core/files/index.ts'
import type { VpgDefinition } from '../protect/index.ts'

const PrioritySchema = Type.Union([Type.Literal('low'), Type.Literal('normal'), Type.Literal('high')])
const VpgFile = Type.Object({
  format: Type.Literal(1),
  vpgs: Type.Array(Type.Object({ name: Type.String(), vmIds: Type.Array(Type.Integer()), checkpointEveryMs: Type.Integer(), priority: Type.Optional(PrioritySchema), generation: Type.Optional(Type.Integer({ minimum: 1 })) })),
})

/** The definitions of VPGs, in one small file (on a cluster: in its file system). */
export class VpgBook {
  readonly #path: string

  constructor(path: string) {
    this.#path = path
  }

  /** @throws CdpError FORMAT if the file is not what we write */
  async read(): Promise<VpgDefinition[]> {
    return (await this.readIfThere()) ?? []
  }

  /** As `read`; undefined if there is no file. */
  async readIfThere(): Promise<VpgDefinition[] | undefined> {
    const content = await readJsonFile(this.#path)
    if (content === undefined) return undefined
    if (!Value.Check(VpgFile, content)) throw new CdpError('FORMAT', `${this.#path} does not hold VPG definitions`, { hint: 'Restore it from a backup.' })
    return content.vpgs
  }

  async write(vpgs: readonly VpgDefinition[]): Promise<void> {
    await writeJsonFile(this.#path, { format: 1, vpgs })
  }
}
